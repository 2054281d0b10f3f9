"""The error of the coarser images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from underpaint import ConfigError, Loss, StepTensors
from underpaint_vfmvae.config import PyramidConfig

__all__ = ["Pyramid"]


class Pyramid(Loss):
    """Sum over the coarser images of the mean of |x̂_i − x_i|, where x_i is the target shrunk to the size of x̂_i.

    Images are in [-1, 1]. The authors give it the weight 0.1 during the first 5 million images.
    """

    needs = frozenset({"images", "reconstruction"})

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__()
        self._config = config

    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return ``pyramid``.

        Raises:
            ConfigError: The decoder gives no coarser images.
        """
        assert step.images is not None
        assert step.reconstruction is not None
        coarse = step.reconstruction.pyramid
        if not coarse:
            raise ConfigError(
                "The loss 'vfmvae/pyramid' compares coarser images, and the decoder gives none; use it with a decoder "
                "that does, such as 'vfmvae/decoder', or leave it out."
            )
        target = step.images.float()
        errors = [(image.float() - self._shrunk(target, image)).abs().mean() for image in coarse]
        return {"pyramid": torch.stack(errors).sum()}

    def _shrunk(self, target: Tensor, like: Tensor) -> Tensor:
        size = (like.shape[-2], like.shape[-1])
        return F.interpolate(target, size, mode=self._config.interpolation, antialias=True, align_corners=False)
