"""DDPM's noise schedules, as noise fractions of the flow with the same ratio of signal to noise."""

from __future__ import annotations

import math
from itertools import accumulate

__all__ = ["continuous", "respaced"]

_BETAS = (0.1, 20.0)
_STEPS = 1000


def continuous(time: float) -> float:
    """Return t for a time in [0, 1] of the DDPM in continuous time (Song et al. 2021, appendix C)."""
    low, high = _BETAS
    log_alpha = -0.25 * time**2 * (high - low) - 0.5 * time * low
    return _fraction(2.0 * log_alpha)


def respaced(steps: int) -> list[float]:
    """Return t of some of the 1000 timesteps of the published DDPM, from the noisiest to the first.

    β grows linearly from 10⁻⁴ to 2·10⁻² (Ho et al. 2020, §4). The timesteps are evenly spaced, both ends included, and
    rounded to whole numbers (Nichol & Dhariwal 2021, §4).
    """
    low, high = (beta / _STEPS for beta in _BETAS)
    betas = (low + (high - low) * i / (_STEPS - 1) for i in range(_STEPS))
    table = list(accumulate(math.log1p(-beta) for beta in betas))
    return [_fraction(table[round(i * (_STEPS - 1) / (steps - 1))]) for i in reversed(range(steps))]


def _fraction(log_kept: float) -> float:
    """Return t from log ᾱ: σ/(α + σ) with α² = ᾱ and σ² = 1 − ᾱ."""
    alpha, sigma = math.exp(0.5 * log_kept), math.sqrt(-math.expm1(log_kept))
    return sigma / (alpha + sigma)
