"""Heun's method."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from underpaint import FreshNoise, Sampler, VelocityField
from underpaint_samplers.config import StepsConfig
from underpaint_samplers.grid import protocol, times, uniform_grid

__all__ = ["Heun"]


class Heun(Sampler):
    """Second-order integration by the mean of the velocities at both ends of a step (explicit trapezoid rule).

    On the grid of ``euler``, with two evaluations a step: the second at the point that Euler's step reaches, at its
    own time. The last is at t = 0.
    """

    def __init__(self, config: StepsConfig) -> None:
        self._config = config

    def sample(self, field: VelocityField, noise: Tensor, fresh: FreshNoise) -> Tensor:
        """Carry B×d×h×w noise to latents of the same type; `fresh` is not used."""
        x = noise
        for now, following in pairwise(uniform_grid(self._config, noise)):
            width = following - now
            start = field(x, times(now, x)).to(x.dtype)
            end = field(x + width * start, times(following, x)).to(x.dtype)
            x = x + width * (start + end) / 2
        return x

    def protocol(self) -> Mapping[str, Any]:
        """Return solver, evaluations, grid points and shift."""
        return protocol("heun", self._config, evaluations=2 * self._config.steps)
