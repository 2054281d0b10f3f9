"""DDPM's noise schedules, as noise fractions of the flow with the same ratio of signal to noise."""

from __future__ import annotations

import math

from underpaint import ddpm_fractions

__all__ = ["continuous", "respaced"]

_BETAS = (0.1, 20.0)


def continuous(time: float) -> float:
    """Return t for a time in [0, 1] of the DDPM in continuous time (Song et al. 2021, appendix C)."""
    low, high = _BETAS
    log_alpha = -0.25 * time**2 * (high - low) - 0.5 * time * low
    alpha, sigma = math.exp(log_alpha), math.sqrt(-math.expm1(2.0 * log_alpha))
    return sigma / (alpha + sigma)


def respaced(steps: int) -> list[float]:
    """Return t of some of the 1000 timesteps of the published DDPM, from the noisiest to the first.

    The timesteps are evenly spaced, both ends included, and rounded to whole numbers (Nichol & Dhariwal 2021, §4).
    """
    table = ddpm_fractions().tolist()
    last = len(table) - 1
    return [table[round(i * last / (steps - 1))] for i in reversed(range(steps))]
