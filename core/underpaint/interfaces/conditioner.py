"""Conditioners: labels or texts to the condition of a backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor, nn

from underpaint.interfaces.component import Component

__all__ = ["Condition", "Conditioner"]


# Not frozen: torch.compile cannot trace how a frozen class is made.
@attrs.define(eq=False)
class Condition:
    """What a generation is conditioned on.

    Attributes:
        tokens: B×L×token_dim, or None.
        mask: B×L, True where a token counts, or None when all do.
        pooled: B×pooled_dim, or None.
    """

    tokens: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None

    @staticmethod
    def join(first: Condition, second: Condition) -> Condition:
        """Stack two conditions of the same make along the batch, `first` before `second`."""

        def pair(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.cat((a, b))

        return Condition(
            pair(first.tokens, second.tokens),
            pair(first.mask, second.mask),
            pair(first.pooled, second.pooled),
        )


class Conditioner(nn.Module, Component, ABC):
    """Labels or texts to `Condition`.

    Made with the context keywords ``width`` (the backbone's; a learned table may use it as its
    dimension) and ``classes`` (number of classes of the data set, 0 when it has none).

    Attributes:
        accepts: Whether it is given an integer tensor of shape B or a sequence of B texts.
        pooled_dim: Width of `Condition.pooled`, 0 when it gives none.
        token_dim: Width of `Condition.tokens`, 0 when it gives none.
    """

    accepts: ClassVar[Literal["label", "text"]]
    pooled_dim: int
    token_dim: int

    @abstractmethod
    def forward(self, inputs: Tensor | Sequence[str], drop: Tensor | None = None) -> Condition:
        """Return the condition of B inputs; samples where `drop` (B, bool) is True get the null one."""

    @abstractmethod
    def null(self, batch: int, device: torch.device) -> Condition:
        """Return the unconditional condition for guidance, for a batch of that size.

        Raises:
            NotImplementedError: There is none; guidance by it is refused then.
        """
