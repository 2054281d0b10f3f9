"""DDIM and DDPM over a flow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from underpaint import FreshNoise, Sampler, VelocityField
from underpaint_samplers.config import DDIMConfig
from underpaint_samplers.grid import protocol, shift_factor, shift_time, times

__all__ = ["DDIM"]

# β of the continuous-time DDPM (Song et al. 2021, appendix C).
_BETA = (0.1, 20.0)


class DDIM(Sampler):
    """The generalised sampler of DDIM (Song, Meng & Ermon 2021, eq. 12 and 16); η = 1 is DDPM's ancestral sampling.

    It works on the variance-preserving path: the flow's state at noise fraction t, divided by r = √((1−t)² + t²), is
    a DDPM's state with signal α = (1−t)/r and noise σ = t/r, and the velocity gives data x − t·v and noise
    x + (1−t)·v. Grid points lie where uniform times of DDPM's linear schedule have their signal-to-noise ratio, then
    are shifted; the first is at t = 1. With η = 0 these are Euler's steps on that grid.
    """

    def __init__(self, config: DDIMConfig) -> None:
        self._config = config

    def grid(self, noise: Tensor) -> list[float]:
        """Return the ``steps + 1`` noise fractions, from 1 to 0, after the shift."""
        alpha, steps = shift_factor(self._config, noise), self._config.steps
        return [1.0, *(shift_time(_fraction(1.0 - i / steps), alpha) for i in range(1, steps + 1))]

    def sample(self, field: VelocityField, noise: Tensor, fresh: FreshNoise) -> Tensor:
        """Carry B×d×h×w noise to latents of the same type."""
        eta = self._config.eta
        x = noise
        for now, following in pairwise(self.grid(noise)):
            velocity = field(x, times(now, x)).to(x.dtype)
            data, implied = x - now * velocity, x + (1.0 - now) * velocity
            # Of the noise at the next point, DDIM draws this share of the variance anew.
            share = eta**2 * _posterior(now, following)
            x = (1.0 - following) * data + following * math.sqrt(1.0 - share) * implied
            if eta > 0.0 and following > 0.0:
                x = x + following * math.sqrt(share) * fresh()
        return x

    def protocol(self) -> Mapping[str, Any]:
        """Return solver, evaluations, grid points, shift and η."""
        return {**protocol("ddim", self._config, evaluations=self._config.steps), "eta": self._config.eta}


def _fraction(time: float) -> float:
    """Return the noise fraction t of the flow with the signal-to-noise ratio of DDPM at a time in [0, 1]."""
    low, high = _BETA
    log_alpha = -0.25 * time**2 * (high - low) - 0.5 * time * low
    alpha, sigma = math.exp(log_alpha), math.sqrt(-math.expm1(2.0 * log_alpha))
    return sigma / (alpha + sigma)


def _posterior(now: float, following: float) -> float:
    """Return σ_η²/σ² at the next point for η = 1: (1 − α_now²/α_next²)/σ_now² on the variance-preserving path."""
    ratio = (1.0 - now) / (1.0 - following) if following < 1.0 else 1.0
    # α²/α'² and σ² with the lengths r of both points, r² = (1−t)² + t².
    now2, next2 = (1.0 - now) ** 2 + now**2, (1.0 - following) ** 2 + following**2
    return min(1.0, max(0.0, 1.0 - ratio**2 * next2 / now2) * now2 / now**2)
