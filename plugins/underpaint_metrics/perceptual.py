"""LPIPS as a metric: image by image, against the original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import underpaint
from underpaint import Reconstruction, StepTensors, tensor_hash
from underpaint_metrics.config import LpipsMetricConfig
from underpaint_metrics.paired import DATA_RANGE, MeanOverImages

__all__ = ["LPIPS"]


class LPIPS(MeanOverImages):
    """Mean over the images of LPIPS (Zhang et al. 2018), VGG variant, version 0.1, as ``lpips``; lower is better.

    The distance is that of the loss of this name. The weights are not moved or saved with the metric.

    Raises:
        DataError: There are no weights, or the files are not what they should be.
    """

    name = "lpips"
    higher_is_better = False

    def __init__(self, config: LpipsMetricConfig) -> None:
        super().__init__()
        loss = underpaint.create(
            "loss", "lpips", weights=config.weights, heads=config.heads, download=config.download
        ).requires_grad_(False)
        # In a tuple, so that half a gigabyte of weights is no part of the metric's state.
        self._loss = (loss,)
        self._hash = tensor_hash(loss.state_dict())

    @torch.no_grad()
    def score(self, images: Tensor, references: Tensor) -> Tensor:
        """Return the distance of each image."""
        (loss,) = self._loss
        loss.to(images.device)
        shown, wanted = (2.0 * levels.float() / DATA_RANGE - 1.0 for levels in (images, references))
        values = [
            loss(StepTensors(step=0, images=b[None], reconstruction=Reconstruction(a[None])))["lpips"]
            for a, b in zip(shown, wanted, strict=True)
        ]
        return torch.stack(values).double()

    def protocol(self) -> Mapping[str, Any]:
        """Return network and weights, and the number of images of the last `compute` (None before it)."""
        return {
            **super().protocol(),
            "mean": "of each image's value",
            "network": "VGG-16, version 0.1",
            "weights": self._hash[:32],
        }
