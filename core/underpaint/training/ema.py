"""The exponential moving average of the weights, in shards that lie where the fp32 master weights lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Ema"]


class Ema:
    """An average of exactly the part of the weights that this rank updates.

    Every rank averages its own shard after the optimizer changed it, so nothing is communicated and
    nothing is held twice under ZeRO 1–3.

    Args:
        masters: The fp32 shards that the optimizer of this rank updates, in place.

    Attributes:
        shards: The average of each.
    """

    def __init__(self, masters: Sequence[Tensor]) -> None:
        self._masters = [master.detach() for master in masters]
        self.shards = [master.clone() for master in self._masters]

    def reset(self) -> None:
        """Start again from the weights as they are."""
        torch._foreach_copy_(self.shards, self._masters)

    def update(self, decay: float) -> None:
        """Take in the weights of one applied step: ema ← decay·ema + (1 − decay)·weights."""
        torch._foreach_lerp_(self.shards, self._masters, 1.0 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Exchange the average and the master weights for the time of the context.

        What gathers or sets full master weights then gathers or sets full averages. The values change
        places, not the tensors: DeepSpeed holds views into the master shards.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        # One shard at a time, so that the copy in between is as large as the largest shard and no larger.
        for shard, master in zip(self.shards, self._masters, strict=True):
            kept = master.clone()
            master.copy_(shard)
            shard.copy_(kept)
