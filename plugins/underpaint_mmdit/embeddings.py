"""Patches of a latent, and embeddings of positions and vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["TIMES", "patches", "position_table", "rotations", "time_sinusoids", "unpatch", "vector_mlp"]

TIMES = 256
"""Sinusoids of a time."""


def _frequencies(count: int, device: torch.device | None) -> Tensor:
    steps = torch.arange(count, dtype=torch.float64, device=device)
    return torch.exp(steps * (-math.log(10_000.0) / max(count, 1)))


def time_sinusoids(t: Tensor) -> Tensor:
    """Return [cos, sin] of 1000·t times 10000^(−i/128) for i < 128: float32 of B×256 for times of shape B.

    SD3 and FLUX both count time in thousandths, so that the fastest sinusoid turns 159 times from data to noise.
    """
    # In float32, as the published networks saw it: at angles of 1000 its rounding shows in the fifth digit. So would
    # that of a processor's own exponential, which may be off in the last bit.
    exponents = -math.log(10_000.0) * torch.arange(TIMES // 2, dtype=torch.float32, device=t.device) / (TIMES // 2)
    angles = (1000.0 * t.float())[:, None] * exponents.double().exp().float()
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def position_table(side: int, width: int) -> Tensor:
    """Return side×side×width float32 positions: sines, then cosines, of the column, then those of the row."""
    angles = torch.arange(side, dtype=torch.float64)[:, None] * _frequencies(width // 4, None)
    line = torch.cat((angles.sin(), angles.cos()), dim=1).float()
    shape = (side, side, width // 2)
    return torch.cat((line[None].expand(shape), line[:, None].expand(shape)), dim=2)


def rotations(texts: int, rows: int, columns: int, axes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of rotary positions, each float32 of (texts + rows·columns)×(sum of axes / 2).

    Channel pair i of an axis turns by index·10000^(−2i/channels of the axis) (Su et al. 2021). Text tokens, and the
    first axis, have index 0.
    """
    still, vertical, horizontal = (axis // 2 for axis in axes)
    y, x = (torch.arange(size, dtype=torch.float64, device=device) for size in (rows, columns))
    grid = torch.zeros(rows, columns, still + vertical + horizontal, dtype=torch.float64, device=device)
    grid[:, :, still : still + vertical] = y[:, None, None] * _frequencies(vertical, device)
    grid[:, :, still + vertical :] = x[None, :, None] * _frequencies(horizontal, device)
    angles = torch.cat((grid.new_zeros(texts, grid.shape[2]), grid.flatten(0, 1)))
    return angles.cos().float(), angles.sin().float()


def vector_mlp(inputs: int, width: int) -> nn.Sequential:
    """Return the two layers that bring a B×inputs vector to B×width."""
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


def patches(x: Tensor, patch: int) -> Tensor:
    """Cut a B×d×h×w latent into B×N×(d·patch²) tokens, row by row, each read channel by channel."""
    b, d, h, w = x.shape
    x = x.reshape(b, d, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, (h // patch) * (w // patch), d * patch**2)


def unpatch(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Put tokens, as `patches` cuts them, together to a latent."""
    b, (rows, columns) = tokens.shape[0], grid
    x = tokens.reshape(b, rows, columns, -1, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, -1, rows * patch, columns * patch)
