"""Images to crops of one size, and pixels to the range of the networks."""

from __future__ import annotations

from typing import Literal

import attrs
import numpy as np
import torch
from attrs import validators as v
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from underpaint.errors import BrokenImageError

__all__ = ["MIN_SIDE", "Crop", "to_tensor", "to_uint8"]

MIN_SIDE = 8
"""Shortest side of an image that is used, in pixels; smaller files are placeholders, not pictures."""


@attrs.frozen
class Crop:
    """Resizes an image until it just covers the crop, or to a given size, then cuts the crop out.

    Resizing is Pillow's bicubic filter, which is antialiased when it shrinks. Images smaller than the crop
    are enlarged, as is the custom in the field.

    Attributes:
        height: Pixels.
        width: Pixels.
        crop: Where along the longer side the crop is taken.
        flip: Flip half of the images horizontally.
        resize: Pixels of the resized image's shorter side, where that is more than covers the crop.
        zoom: Range of the sides of what is cut out, before it is resized to the crop, as a share of the largest of its
            shape that the image has room for; the place is random then.
    """

    height: int = attrs.field(validator=v.gt(0))
    width: int = attrs.field(validator=v.gt(0))
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    resize: int | None = None
    zoom: tuple[float, float] | None = None

    def __call__(self, image: NDArray[np.uint8], rng: np.random.Generator, key: str = "image") -> NDArray[np.uint8]:
        """Cut one crop.

        Args:
            image: H×W×3 uint8.
            rng: Source of the place and the flip. A crop draws the same amount whatever the image's size.
            key: Name of the sample, for the error.

        Returns:
            height×width×3 uint8.

        Raises:
            BrokenImageError: The shorter side is below `MIN_SIDE`.
        """
        height, width = image.shape[:2]
        if min(height, width) < MIN_SIDE:
            raise BrokenImageError(key, f"it is {height}×{width} pixels, smaller than {MIN_SIDE}")
        image = self._resized(image, rng) if self.zoom is None else self._zoomed(image, rng, self.zoom)
        if self.flip and rng.random() < 0.5:
            # Fifteen times as fast as copying NumPy's reversed view; the copy is there because torch wants it writable.
            image = torch.from_numpy(image.copy()).flip(1).numpy()
        return image

    def _zoomed(
        self, image: NDArray[np.uint8], rng: np.random.Generator, zoom: tuple[float, float]
    ) -> NDArray[np.uint8]:
        height, width = image.shape[:2]
        share = zoom[0] + (zoom[1] - zoom[0]) * rng.random()
        scale = share / max(self.height / height, self.width / width)
        # The side that fills the image is above it by a rounding error for some sizes, and Pillow takes no such box.
        tall, wide = min(height, self.height * scale), min(width, self.width * scale)
        top, left = rng.random(2) * (height - tall, width - wide)
        box = (left, top, left + wide, top + tall)
        return np.asarray(Image.fromarray(image).resize((self.width, self.height), Image.Resampling.BICUBIC, box=box))

    def _resized(self, image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        height, width = image.shape[:2]
        scale = max(self.height / height, self.width / width, (self.resize or 0) / min(height, width))
        tall, wide = max(self.height, round(height * scale)), max(self.width, round(width * scale))
        if (tall, wide) != (height, width):
            image = np.asarray(Image.fromarray(image).resize((wide, tall), Image.Resampling.BICUBIC))
        spare = (tall - self.height, wide - self.width)
        top, left = spare[0] // 2, spare[1] // 2
        if self.crop == "random":
            top, left = (int(share * (count + 1)) for share, count in zip(rng.random(2), spare, strict=True))
        return image[top : top + self.height, left : left + self.width]


def to_tensor(images: Tensor) -> Tensor:
    """Turn pixels into what networks take.

    Args:
        images: B×H×W×3 uint8.

    Returns:
        B×3×H×W float32 in [-1, 1], on the same device.
    """
    assert (images.dtype, images.ndim, images.shape[-1]) == (torch.uint8, 4, 3)
    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Turn images of a network into pixels: rounded to the nearest level, clamped at black and white.

    Args:
        images: B×3×H×W in [-1, 1].

    Returns:
        B×H×W×3 uint8, on the same device.
    """
    assert (images.ndim, images.shape[1]) == (4, 3)
    levels = images.detach().float().add(1.0).mul(127.5).round().clamp(0.0, 255.0)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
