"""DiT's timesteps: those of DDPM's table, and between them."""

from __future__ import annotations

import torch
from torch import Tensor

from underpaint import ddpm_fractions

__all__ = ["timestep"]


def timestep(t: Tensor) -> Tensor:
    """Return the timestep whose signal-to-noise ratio is that of the noise fraction t, float64 of shape B.

    Between two timesteps it is linear in log(t/(1 − t)), which is minus half the logarithm of the ratio; at the
    fractions of `ddpm_fractions` it is exact. Less noise than that of timestep 0 gives 0, and more than that of
    timestep 999 gives 999.
    """
    table = torch.logit(ddpm_fractions(t.device))
    ratio = torch.logit(t.double()).clamp(table[0], table[-1])
    upper = torch.searchsorted(table, ratio).clamp(1, len(table) - 1)
    low, high = table[upper - 1], table[upper]
    return upper - 1 + (ratio - low) / (high - low)
