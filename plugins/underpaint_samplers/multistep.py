"""A multistep method."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from underpaint import FreshNoise, Sampler, VelocityField
from underpaint_samplers.config import StepsConfig
from underpaint_samplers.grid import protocol, times, uniform_grid

__all__ = ["AdamsBashforth"]


class AdamsBashforth(Sampler):
    """Second-order integration with one evaluation a step: the velocity is extrapolated from the step before.

    x' = x + h·(v + h/(2h₀)·(v − v₀)) with v₀ and h₀ of the last step, for steps of any sizes (Hairer, Nørsett &
    Wanner, Solving Ordinary Differential Equations I, §III.5). The first step is Euler's. Grid as for ``euler``.
    """

    def __init__(self, config: StepsConfig) -> None:
        self._config = config

    def sample(self, field: VelocityField, noise: Tensor, fresh: FreshNoise) -> Tensor:
        """Carry B×d×h×w noise to latents of the same type; `fresh` is not used."""
        x = noise
        before: tuple[Tensor, float] | None = None
        for now, following in pairwise(uniform_grid(self._config, noise)):
            width = following - now
            velocity = field(x, times(now, x)).to(x.dtype)
            slope = velocity
            if before is not None:
                slope = velocity + (width / (2 * before[1])) * (velocity - before[0])
            x = x + width * slope
            before = velocity, width
        return x

    def protocol(self) -> Mapping[str, Any]:
        """Return solver, evaluations, grid points and shift."""
        return protocol("ab2", self._config, evaluations=self._config.steps)
