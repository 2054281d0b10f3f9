"""A latent and its companion vector as one tensor, which samplers and guidance treat as a latent of more channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from underpaint.interfaces.backbone import Backbone
from underpaint.interfaces.conditioner import Condition

__all__ = ["companion_maps", "join", "network", "separate"]


def companion_maps(channels: int, grid: tuple[int, int]) -> int:
    """Return how many h×w maps hold a vector of some channels."""
    return -(-channels // (grid[0] * grid[1]))


def join(latent: Tensor, vector: Tensor) -> Tensor:
    """Return B×(d + n)×h×w: the latent, then the vector in as many maps as it takes, the rest of the last one zero.

    Maps, so that shifts which count the grid's tokens find the grid as it is.
    """
    rows, columns = latent.shape[2:]
    maps = companion_maps(vector.shape[1], (rows, columns))
    filled = F.pad(vector, (0, maps * rows * columns - vector.shape[1]))
    return torch.cat((latent, filled.view(-1, maps, rows, columns)), dim=1)


def separate(state: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Undo `join` for a vector of some channels."""
    maps = companion_maps(channels, (state.shape[2], state.shape[3]))
    return state[:, :-maps], state[:, -maps:].flatten(1)[:, :channels]


def network(backbone: Backbone) -> Callable[[Tensor, Tensor, Condition], Tensor]:
    """Return a backbone's output as a function of x_t, t and condition.

    With its companion, if it has one, joined; or with its variance, if it has one, in as many channels below.
    """
    channels = backbone.companion
    assert not (channels and backbone.variance)
    if backbone.variance:

        def both(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            prediction = backbone(x_t, t, condition)
            return torch.cat((prediction.velocity, prediction.variance), dim=1)

        return both
    if not channels:
        return lambda x_t, t, condition: backbone(x_t, t, condition).velocity

    def run(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        latent, vector = separate(x_t, channels)
        prediction = backbone(latent, t, condition, companion=vector)
        return join(prediction.velocity, prediction.companion)

    return run
