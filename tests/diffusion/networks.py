"""A conditioner and backbones that are easy to write down."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection

import torch
from torch import Tensor

from underpaint import Backbone, Condition, Conditioner, Prediction


class Nothing(Conditioner):
    """No condition."""

    accepts = "label"
    pooled_dim = token_dim = 0

    def forward(self, inputs: object, drop: Tensor | None = None) -> Condition:
        return Condition()

    def null(self, batch: int, device: torch.device) -> Condition:
        return Condition()


class WithCompanion(Backbone):
    """A backbone with a companion vector of 7 channels; derived classes say what it answers."""

    width = patch = 1
    companion = 7

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        layers: Collection[int] = (),
        companion: Tensor | None = None,
    ) -> Prediction:
        assert companion is not None
        velocity, vector = self.answer(x_t, companion, t, condition)
        return Prediction(velocity, companion=vector)

    @abstractmethod
    def answer(self, latent: Tensor, vector: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Return what is predicted for latent and vector."""
