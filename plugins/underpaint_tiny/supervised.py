"""The supervised objective of ``tiny/vit``, for comparison."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from underpaint import Loss, StepSizes, StepTensors
from underpaint_tiny.augment import views
from underpaint_tiny.config import SupervisedConfig

__all__ = ["Supervised"]


class Supervised(Loss):
    """Cross-entropy of a linear head on the pooled features of one random view of each image."""

    needs = frozenset({"inputs", "encoder", "labels"})
    trains = True

    def __init__(self, config: SupervisedConfig) -> None:
        super().__init__()
        self._config = config
        self.head = nn.Linear(1, config.classes)

    def prepare(self, sizes: StepSizes) -> None:
        """Build the head for the encoder's last map."""
        self.head = nn.Linear(sizes.feature_channels[-1], self._config.classes)

    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return ``supervised``."""
        assert step.inputs is not None
        assert step.encoder is not None
        assert step.labels is not None
        height, width = step.inputs.shape[-2:]
        seen = views(step.inputs, (height, width), self._config.area)
        pooled = step.encoder(seen).pooled
        assert pooled is not None
        scores = self.head(pooled).float()
        return {"supervised": F.cross_entropy(scores, step.labels, label_smoothing=self._config.smoothing)}
