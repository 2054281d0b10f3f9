"""Fixed embeddings of positions and times."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Tables", "grid_positions", "grid_rotations", "rotate", "time_sinusoids"]

_MAX_PERIOD = 10_000.0


class Tables:
    """Makes a table for a grid once, and keeps it.

    It is no module, and its tables are no buffers: casting a model to bf16 must not round them for good, and a file
    must not tie a model to one grid.

    Args:
        make: Gives the float64 table of a grid of that many rows and columns, on the CPU.
    """

    def __init__(self, make: Callable[[int, int], Tensor]) -> None:
        self._make = make
        self._known: dict[tuple[int, int], Tensor] = {}

    def __call__(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the table of a grid."""
        known = self._known.get((rows, columns))
        if known is None or known.device != device or known.dtype != dtype:
            # A table made while sampling must serve a later training step: autograd saves no inference tensors.
            with torch.inference_mode(False):
                known = self._make(rows, columns).to(device, dtype)
            self._known[rows, columns] = known
        return known


def _frequencies(count: int) -> Tensor:
    steps = torch.arange(count, dtype=torch.float64, device="cpu")
    return torch.exp(steps * (-math.log(_MAX_PERIOD) / count))


def _places(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    index = torch.arange(rows * columns, dtype=torch.float64, device="cpu")
    return torch.div(index, columns, rounding_mode="floor"), index % columns


def grid_positions(rows: int, columns: int, width: int) -> Tensor:
    """Return 2-D sine-cosine positions, float64 of (rows·columns)×width, row by row.

    The first half of the channels encodes the column and the second half the row, each as sines, then cosines, of
    the index times 10000^(−4i/width), as in DiT and MAE (He et al. 2022). Indices count from the upper left corner.
    """
    row, column = _places(rows, columns)
    angles_x, angles_y = (torch.outer(place, _frequencies(width // 4)) for place in (column, row))
    return torch.cat((angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()), dim=1)


def grid_rotations(rows: int, columns: int, channels: int) -> Tensor:
    """Return what `rotate` needs for heads of so many channels: float64 of 2×(rows·columns)×1×channels.

    2-D rotary positions (Su et al. 2021, in the form of EVA-02, Fang et al. 2023): pairs of neighbouring channels are
    turned by an angle; the first half of the pairs by the row times 10000^(−4i/channels), the second by the column.
    The first table holds the cosines, the second the sines, negative for the first channel of a pair.
    """
    row, column = _places(rows, columns)
    frequencies = _frequencies(channels // 4)
    angles = torch.cat((torch.outer(row, frequencies), torch.outer(column, frequencies)), dim=1)
    cosines = torch.stack((angles.cos(), angles.cos()), dim=2)
    sines = torch.stack((-angles.sin(), angles.sin()), dim=2)
    return torch.stack((cosines, sines)).flatten(2)[:, :, None]


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Return queries or keys, B×N×heads×channels, turned by `rotation` of `grid_rotations`."""
    cosines, sines = rotation.unbind(0)
    # One product with each channel's partner: a compiler makes a single pass of it, with no halves to join.
    partners = x.view(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
    turned: Tensor = (x * cosines + partners * sines).to(x.dtype)
    return turned


def time_sinusoids(t: Tensor, count: int = 256) -> Tensor:
    """Return [cos, sin] of t times 10000^(−2i/count), float32 of B×count."""
    angles = t.float()[:, None] * _frequencies(count // 2).to(t.device, torch.float32)
    return torch.cat((angles.cos(), angles.sin()), dim=1)
