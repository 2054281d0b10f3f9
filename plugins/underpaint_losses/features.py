"""A perceptual distance on any encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import underpaint
from underpaint import Loss, StepTensors
from underpaint_losses.config import FeaturesConfig

__all__ = ["FeatureDistance"]


class FeatureDistance(Loss):
    """Squared distance of normalised features of the reconstruction and of the original.

    For each map, every cell's feature vector is scaled to unit length; the squared Euclidean distances are averaged
    over cells and samples, then over maps. It lies in [0, 4]. This is LPIPS (Zhang et al. 2018, eq. 1) with uniform
    heads and the mean, not the sum, over layers. The encoder is frozen, and the gradient flows through the
    reconstruction only.
    """

    needs = frozenset({"images", "reconstruction"})

    def __init__(self, config: FeaturesConfig) -> None:
        super().__init__()
        options: dict[str, Any] = dict(config.options)
        if config.layers is not None:
            options["layers"] = config.layers
        self.encoder = underpaint.create("encoder", config.encoder, **options)
        self.encoder.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: the encoder is a measure, not a part that learns."""
        return super().train(False)

    def units(self) -> Sequence[nn.Module]:
        """Return the encoder."""
        return (self.encoder,)

    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return ``features``.

        Raises:
            DataError: The images do not divide into the encoder's cells.
        """
        assert step.images is not None
        assert step.reconstruction is not None
        self.encoder.grid(step.images.shape[2], step.images.shape[3])
        with torch.no_grad():
            wanted = self.encoder(step.images).maps
        maps = self.encoder(step.reconstruction.image.to(step.images.dtype)).maps
        distances = [
            (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).mean()
            for a, b in zip(maps, wanted, strict=True)
        ]
        return {"features": torch.stack(distances).mean()}
