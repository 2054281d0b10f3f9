"""Euler's method."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from underpaint import Sampler, VelocityField
from underpaint_samplers.config import EulerConfig

__all__ = ["Euler"]


class Euler(Sampler):
    """First-order integration of dx/dt = velocity from t = 1 to t = 0; deterministic.

    The grid is uniform in t before the shift, both ends included: ``steps`` evaluations, ``steps + 1`` points.
    The field is evaluated at the upper end of each step, so never at t = 0.
    """

    def __init__(self, config: EulerConfig) -> None:
        self._config = config

    def grid(self) -> list[float]:
        """Return the ``steps + 1`` noise fractions, from 1 to 0, after the shift."""
        steps, shift = self._config.steps, self._config.shift
        uniform = [1.0 - i / steps for i in range(steps + 1)]
        return [shift * t / (1.0 + (shift - 1.0) * t) for t in uniform]

    def sample(self, field: VelocityField, noise: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Carry B×d×h×w noise to latents of the same type; `generator` is not used."""
        x = noise
        grid = self.grid()
        for now, following in pairwise(grid):
            t = torch.full((x.shape[0],), now, device=x.device)
            x = x + (following - now) * field(x, t).to(x.dtype)
        return x

    def protocol(self) -> Mapping[str, Any]:
        """Return solver, evaluations, grid points and shift."""
        steps = self._config.steps
        return {"solver": "euler", "evaluations": steps, "grid_points": steps + 1, "shift": self._config.shift}
