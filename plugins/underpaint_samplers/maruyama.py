"""The Euler–Maruyama method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from underpaint import FreshNoise, Sampler, VelocityField
from underpaint_samplers.config import EulerMaruyamaConfig
from underpaint_samplers.grid import protocol, shift_factor, shift_time, times

__all__ = ["EulerMaruyama"]


class EulerMaruyama(Sampler):
    """The reverse SDE with diffusion w = 2t, which has the marginals of the flow (Ma et al. 2024).

    REPA and REG sample so; their 250 steps are ``steps: 250`` here.

    dx = [v − w·s/2]·dt + √w·dW̄ with the score s = −ε̂/t and the noise that the velocity implies, ε̂ = x + (1 − t)·v;
    so the drift is v + ε̂, without a division by t. The grid is uniform before the shift from 1 to `last`, from where
    one step of the drift alone goes to 0.
    """

    def __init__(self, config: EulerMaruyamaConfig) -> None:
        self._config = config

    def grid(self, noise: Tensor) -> list[float]:
        """Return the ``steps + 1`` noise fractions, from 1 to `last` and 0, after the shift."""
        alpha = shift_factor(self._config, noise)
        start = shift_time(self._config.last, 1.0 / alpha)
        points = self._config.steps - 1
        return [*(shift_time(1.0 - (1.0 - start) * i / points, alpha) for i in range(points + 1)), 0.0]

    def sample(self, field: VelocityField, noise: Tensor, fresh: FreshNoise) -> Tensor:
        """Carry B×d×h×w noise to latents of the same type."""
        config = self._config
        x = noise.double() if config.float64 else noise
        for now, following in pairwise(self.grid(noise)):
            velocity = field(x.to(noise.dtype), times(now, x)).to(x.dtype)
            implied = x + (1.0 - now) * velocity
            width = following - now
            x = x + width * (velocity + config.noise * implied)
            if following > 0.0 and config.noise > 0.0:
                x = x + math.sqrt(config.noise * 2.0 * now * -width) * fresh().to(x.dtype)
        return x.to(noise.dtype)

    def protocol(self) -> Mapping[str, Any]:
        """Return solver, evaluations, grid points, shift, the last step, diffusion and the type of the state."""
        config = self._config
        return {
            **protocol("euler-maruyama", config, evaluations=config.steps),
            "last": config.last,
            "noise": config.noise,
            "float64": config.float64,
        }
