"""Fixed embeddings of positions and times."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["MAX_PERIOD", "grid_positions", "time_sinusoids"]

MAX_PERIOD = 10_000.0
"""Longest wavelength of the sinusoids is 2π times this."""


def _frequencies(count: int, device: torch.device | None) -> Tensor:
    steps = torch.arange(count, dtype=torch.float64, device=device)
    return torch.exp(steps * (-math.log(MAX_PERIOD) / count))


def grid_positions(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return 2-D sine-cosine positions, float32 of (rows·columns)×width, row by row.

    The first half of the channels encodes the column and the second half the row, each as sines, then cosines, of
    the index times 10000^(−4i/width). DiT inherits this form from MAE (He et al. 2022).
    """
    angles_x = torch.arange(columns, dtype=torch.float64, device=device)[:, None] * _frequencies(width // 4, device)
    angles_y = torch.arange(rows, dtype=torch.float64, device=device)[:, None] * _frequencies(width // 4, device)
    x = torch.cat((angles_x.sin(), angles_x.cos()), dim=1).expand(rows, columns, -1)
    y = torch.cat((angles_y.sin(), angles_y.cos()), dim=1)[:, None].expand(rows, columns, -1)
    return torch.cat((x, y), dim=2).reshape(rows * columns, width).float()


def time_sinusoids(t: Tensor, count: int = 256) -> Tensor:
    """Return [cos, sin] of t times 10000^(−2i/count), float32 of B×count."""
    angles = t.float()[:, None] * _frequencies(count // 2, t.device).float()
    return torch.cat((angles.cos(), angles.sin()), dim=1)
