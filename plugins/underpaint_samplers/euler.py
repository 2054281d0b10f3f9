"""Euler's method."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from underpaint import FreshNoise, Sampler, VelocityField
from underpaint_samplers.config import StepsConfig
from underpaint_samplers.grid import protocol, times, uniform_grid

__all__ = ["Euler"]


class Euler(Sampler):
    """First-order integration of dx/dt = velocity from t = 1 to t = 0; deterministic.

    The grid is uniform in t before the shift, both ends included: ``steps`` evaluations, ``steps + 1`` points.
    The field is evaluated at the upper end of each step, so never at t = 0.
    """

    def __init__(self, config: StepsConfig) -> None:
        self._config = config

    def sample(self, field: VelocityField, noise: Tensor, fresh: FreshNoise) -> Tensor:
        """Carry B×d×h×w noise to latents of the same type; `fresh` is not used."""
        x = noise
        for now, following in pairwise(uniform_grid(self._config, noise)):
            x = x + (following - now) * field(x, times(now, x)).to(x.dtype)
        return x

    def protocol(self) -> Mapping[str, Any]:
        """Return solver, evaluations, grid points and shift."""
        return protocol("euler", self._config, evaluations=self._config.steps)
