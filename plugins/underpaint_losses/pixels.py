"""Errors of the pixels."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from underpaint import Loss, StepTensors

__all__ = ["L1", "Mse"]


class _PixelLoss(Loss):
    needs = frozenset({"images", "reconstruction"})

    def _difference(self, step: StepTensors) -> Tensor:
        assert step.images is not None
        assert step.reconstruction is not None
        return step.reconstruction.image.float() - step.images.float()

    @abstractmethod
    def forward(self, step: StepTensors) -> dict[str, Tensor]: ...


class L1(_PixelLoss):
    """Mean over all pixels and channels of |x̂ − x|, images in [-1, 1]."""

    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return ``l1``."""
        return {"l1": self._difference(step).abs().mean()}


class Mse(_PixelLoss):
    """Mean over all pixels and channels of (x̂ − x)², images in [-1, 1]."""

    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return ``mse``."""
        return {"mse": self._difference(step).square().mean()}
