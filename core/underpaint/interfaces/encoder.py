"""Encoders: images to feature maps."""

from __future__ import annotations

from abc import ABC, abstractmethod

import attrs
from torch import Tensor, nn

from underpaint.errors import DataError
from underpaint.interfaces.component import Component

__all__ = ["Encoder", "EncoderInfo", "Features"]


# Not frozen: torch.compile cannot trace how a frozen class is made.
@attrs.define(eq=False)
class Features:
    """What an encoder sees in a batch of images.

    Attributes:
        maps: One B×C_i×h_i×w_i tensor per layer asked for, shallow to deep.
        pooled: B×C summary of the image, or None where the encoder has none.
        class_tokens: For each map the B×C_i class token of its layer, or None where the encoder has none.
    """

    maps: tuple[Tensor, ...]
    pooled: Tensor | None = None
    class_tokens: tuple[Tensor, ...] | None = None


@attrs.frozen(kw_only=True)
class EncoderInfo:
    """What an encoder declares about itself.

    Attributes:
        channels: Channels of each map in `Features.maps`.
        stride: Pixels of the given image that one cell of a map covers. It may differ from `patch`: a
            patch-14 encoder with stride 16 resizes 256 px to 224 px and gives a 16×16 grid.
        patch: Pixels of the encoder's own input that one cell covers.
        native_size: Height and width it was trained at, in pixels.
        mean: Per-channel mean of its input normalisation, for images in [0, 1].
        std: Per-channel standard deviation of its input normalisation.
        layers: Index of the block each map comes from.
        licence: Licence of the weights, as an SPDX identifier or a sentence.
        source: Where the weights come from, as an address, or "random initialisation".
        non_square: Whether height and width may differ.
    """

    channels: tuple[int, ...]
    stride: int
    patch: int
    native_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    layers: tuple[int, ...]
    licence: str
    source: str
    non_square: bool = True


class Encoder(nn.Module, Component, ABC):
    """Images to `Features`.

    An encoder owns its resize, its mean and std, its patch handling, and drops class and register
    tokens from the maps; it may give class tokens beside them, with the same norm. Its parameters
    require gradients when made; a stage freezes it.
    """

    info: EncoderInfo

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """Encode B×3×H×W images in [-1, 1]; H and W are multiples of ``info.stride``."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width, in cells, of the maps for an image size in pixels.

        Raises:
            DataError: The size does not fit the encoder's stride, or is not square where it must be.
        """
        stride = self.info.stride
        if height < stride or width < stride or height % stride or width % stride:
            fit = (max(stride, height // stride * stride), max(stride, width // stride * stride))
            raise DataError(
                f"Images of {height}×{width} px do not divide into the {stride} px cells of the encoder; "
                f"the nearest size that fits is {fit[0]}×{fit[1]}."
            )
        if height != width and not self.info.non_square:
            raise DataError(
                f"Images of {height}×{width} px were given to an encoder for square images; "
                f"use {min(height, width)}×{min(height, width)}."
            )
        return height // stride, width // stride
