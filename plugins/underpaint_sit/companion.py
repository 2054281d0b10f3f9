"""The loss of a companion vector."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from underpaint import DataError, Loss, StepTensors

__all__ = ["Companion"]


class Companion(Loss):
    """Mean over all elements of (v̂ − v)² of the companion's velocity (Wu et al. 2025, REG; weight 0.03)."""

    needs = frozenset({"prediction", "companion_target"})

    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return ``companion``.

        Raises:
            DataError: The backbone predicts no companion.
        """
        assert step.prediction is not None
        assert step.companion_target is not None
        predicted = step.prediction.companion
        if predicted is None:
            raise DataError(
                "The loss 'companion' compares a companion's velocity, and the backbone predicts none; remove the "
                "loss, or take a backbone with a companion, such as 'reg/XL-1'."
            )
        return {"companion": F.mse_loss(predicted.float(), step.companion_target.float())}
