"""The guard against reconstruction losses that jump."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from underpaint.config.stages import GuardConfig

__all__ = ["Guard"]


class Guard(nn.Module):
    """Says whether a micro-batch may count, on the device, so that nothing waits for the answer.

    The values of the last micro-batch are a buffer: they are saved in checkpoints with the module that holds the guard.

    Args:
        config: Factor and first step.
        keys: The reconstruction losses of the stage.
        average: Averages a tensor over the ranks.
    """

    previous: Tensor

    def __init__(self, config: GuardConfig, keys: Sequence[str], average: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._config = config
        self._keys = tuple(keys)
        self._average = average
        self.register_buffer("previous", torch.full((len(self._keys),), math.nan))

    @torch.no_grad()
    def forward(self, values: Mapping[str, Tensor], step: int) -> Tensor:
        """Compare losses with those of the micro-batch before, and remember them.

        Args:
            values: Losses by key; those outside their window of steps are left out.
            step: Optimizer step.

        Returns:
            Whether the micro-batch may count, a boolean that is the same on every rank.
        """
        absent = torch.full((), math.nan, device=self.previous.device)
        now = self._average(torch.stack([values.get(key, absent).float() for key in self._keys]))
        # False where there is no value yet, or none now: comparisons with NaN are.
        jumped = (now > self._config.factor * self.previous).any()
        # A value that stays high is dropped once: the step before is the measure, whether it counted or not.
        self.previous.copy_(torch.where(now.isfinite(), now, self.previous))
        return ~jumped if step >= self._config.after else torch.ones_like(jumped)
