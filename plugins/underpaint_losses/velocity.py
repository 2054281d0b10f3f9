"""The loss of flow matching."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from underpaint import Loss, StepTensors
from underpaint_losses.config import VelocityConfig

__all__ = ["Velocity"]


class Velocity(Loss):
    """Mean over all elements of (v̂ − v)² (Lipman et al. 2023), and LightningDiT's cosine term when asked for.

    The cosine term is the factor `cosine` times the mean over samples and cells of 1 − cos(v̂, v), the angle taken
    over channels.
    """

    needs = frozenset({"prediction", "target"})

    def __init__(self, config: VelocityConfig) -> None:
        super().__init__()
        self._cosine = config.cosine

    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return ``velocity``, and ``velocity_cosine`` when its factor is not 0."""
        assert step.prediction is not None
        assert step.target is not None
        predicted, target = step.prediction.velocity.float(), step.target.float()
        terms = {"velocity": F.mse_loss(predicted, target)}
        if self._cosine:
            # With torch's eps of 1e-8 the first gradient of a zero-initialised output is so large that Adam's second
            # moment stays inflated for hundreds of steps.
            similarity = F.cosine_similarity(predicted, target, dim=1, eps=1e-4)
            terms["velocity_cosine"] = self._cosine * (1.0 - similarity.mean())
        return terms
