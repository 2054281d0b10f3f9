"""The diffusion process of DiT, and its timesteps as noise fractions of the straight path."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["STEPS", "alphas_cumprod", "noise_fractions", "timestep"]

STEPS = 1000
"""Timesteps of the process."""

_BETAS = (1e-4, 2e-2)


def alphas_cumprod(device: torch.device | str = "cpu") -> Tensor:
    """Return ᾱ_i = Π_{j ≤ i} (1 − β_j), float64 of shape 1000: the share of the data in the variance of step i.

    β grows linearly from 10⁻⁴ to 2·10⁻² (Ho et al. 2020, §4).
    """
    return torch.cumprod(1.0 - torch.linspace(*_BETAS, STEPS, dtype=torch.float64, device=device), dim=0)


def _log_ratios(device: torch.device) -> Tensor:
    kept = alphas_cumprod(device)
    return 0.5 * (torch.log1p(-kept) - kept.log())


def noise_fractions(device: torch.device | str = "cpu") -> Tensor:
    """Return the noise fraction t_i with the signal-to-noise ratio of each timestep, float64 of shape 1000.

    (1 − t)²/t² = ᾱ/(1 − ᾱ), so that t runs from 0.0099 to 0.9937.
    """
    return torch.sigmoid(_log_ratios(torch.device(device)))


def timestep(t: Tensor) -> Tensor:
    """Return the timestep whose signal-to-noise ratio is that of the noise fraction t, float64 of shape B.

    Between two timesteps it is linear in log(t/(1 − t)), which is minus half the logarithm of the ratio; at the
    fractions of `noise_fractions` it is exact. Less noise than that of timestep 0 gives 0, and more than that of
    timestep 999 gives 999.
    """
    table = _log_ratios(t.device)
    ratio = torch.logit(t.double()).clamp(table[0], table[-1])
    upper = torch.searchsorted(table, ratio).clamp(1, STEPS - 1)
    low, high = table[upper - 1], table[upper]
    return upper - 1 + (ratio - low) / (high - low)
