"""DDIM and DDPM over a flow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from underpaint import ConfigError, FreshNoise, Sampler, VarianceField, VelocityField
from underpaint_samplers.config import DDIMConfig
from underpaint_samplers.grid import protocol, shift_factor, shift_time, times
from underpaint_samplers.schedule import continuous, respaced

__all__ = ["DDIM"]


class DDIM(Sampler):
    """The generalised sampler of DDIM (Song, Meng & Ermon 2021, eq. 12 and 16); η = 1 is DDPM's ancestral sampling.

    It works on the variance-preserving path: the flow's state at noise fraction t, divided by r = √((1−t)² + t²), is
    a DDPM's state with signal α = (1−t)/r and noise σ = t/r, and the velocity gives data x − t·v and noise
    x + (1−t)·v. Grid points lie where times of DDPM's linear schedule have their signal-to-noise ratio, then are
    shifted; the last is at t = 0.

    - ``continuous``: uniform times, the first moved to t = 1. With η = 0 these are Euler's steps on that grid.
    - ``discrete``: the published timesteps. The first is 999, at t = 0.9937: the noise is taken as the state there.

    With the learned variance the mean of a step is DDPM's, and log σ² = f·log β + (1 − f)·log β̃ with the backbone's
    fraction f (Nichol & Dhariwal 2021, eq. 15). DiT is sampled so: ``ddpm`` with ``steps: 250``,
    ``schedule: discrete``, ``variance: learned``.
    """

    def __init__(self, config: DDIMConfig) -> None:
        self._config = config
        self.needs_variance = config.variance == "learned"

    def grid(self, noise: Tensor) -> list[float]:
        """Return the ``steps + 1`` noise fractions down to 0, after the shift."""
        config = self._config
        if config.schedule == "discrete":
            return [*respaced(config.steps), 0.0]
        alpha, steps = shift_factor(config, noise), config.steps
        return [1.0, *(shift_time(continuous(1.0 - i / steps), alpha) for i in range(1, steps + 1))]

    def sample(self, field: VelocityField, noise: Tensor, fresh: FreshNoise) -> Tensor:
        """Carry B×d×h×w noise to latents of the same type.

        Raises:
            ConfigError: The variance is to be the learned one, and the backbone has learned none.
        """
        eta, learned = self._config.eta, self.needs_variance
        if learned and not isinstance(field, VarianceField):
            raise ConfigError(
                "The sampler's variance is 'learned', and the backbone gives none (those of DiT do); set variance to "
                "'posterior'."
            )
        grid = self.grid(noise)
        x = noise * _length(grid[0])
        for now, following in pairwise(grid):
            at = times(now, x)
            velocity, fraction = field.both(x, at) if isinstance(field, VarianceField) else (field(x, at), None)
            velocity = velocity.to(x.dtype)
            data, implied = x - now * velocity, x + (1.0 - now) * velocity
            beta, posterior = _variances(now, following)
            # Of the noise at the next point, DDIM draws this share of the variance anew.
            share = min(1.0, eta**2 * posterior * (_length(following) / following) ** 2) if following > 0.0 else 0.0
            x = (1.0 - following) * data + following * math.sqrt(1.0 - share) * implied
            if eta == 0.0 or following == 0.0:
                continue
            if learned:
                assert fraction is not None
                low, high = math.log(posterior), math.log(beta)
                x = x + _length(following) * torch.exp(0.5 * (low + (high - low) * fraction.to(x.dtype))) * fresh()
            else:
                x = x + following * math.sqrt(share) * fresh()
        return x

    def protocol(self) -> Mapping[str, Any]:
        """Return solver, evaluations, grid points, shift, η, and schedule and variance where they are not DDIM's."""
        config = self._config
        facts = {**protocol("ddim", config, evaluations=config.steps), "eta": config.eta}
        if config.schedule != "continuous":
            facts["schedule"] = config.schedule
        if config.variance != "posterior":
            facts["variance"] = config.variance
        return facts


def _length(t: float) -> float:
    """Return r, by which the flow's state is longer than that of the variance-preserving path."""
    return math.hypot(1.0 - t, t)


def _variances(now: float, following: float) -> tuple[float, float]:
    """Return β and β̃ of a step: 1 − ᾱ/ᾱ', and (1 − ᾱ')/(1 − ᾱ)·β (Nichol & Dhariwal 2021, eq. 19)."""
    noisy, next_noisy = ((t / _length(t)) ** 2 for t in (now, following))
    # ᾱ = 1 − noisy; and (ᾱ' − ᾱ)/ᾱ' is no small difference from 1.
    beta = (noisy - next_noisy) / ((1.0 - following) / _length(following)) ** 2
    return beta, next_noisy / noisy * beta
