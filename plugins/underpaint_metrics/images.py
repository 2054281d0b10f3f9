"""What all metrics do to images first: check them, and round them to 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from underpaint import DataError

__all__ = ["LEVELS", "to_levels", "to_pair"]

LEVELS = "8-bit: images in [-1, 1] rounded and clamped to 0…255"
"""What protocols say about it. Images are stored with 8 bits, so numbers are those of the stored images."""


def to_levels(images: Tensor) -> Tensor:
    """Round images to the 256 levels they would be stored with.

    Args:
        images: B×3×H×W in [-1, 1]; values outside are clamped.

    Returns:
        B×3×H×W, uint8.

    Raises:
        DataError: The shape is another, or a value is not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise DataError(f"A metric was given images of shape {tuple(images.shape)}; give B×3×H×W images in [-1, 1].")
    if not torch.isfinite(images).all():
        bad = int((~torch.isfinite(images)).flatten(1).any(1).sum())
        raise DataError(
            f"{bad} of {len(images)} images given to a metric hold values that are not finite; "
            "no number is computed from them, look for the step where the model broke."
        )
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pair(images: Tensor | None, references: Tensor | None, metric: str) -> tuple[Tensor, Tensor]:
    """Round images and their originals to 8 bits.

    Raises:
        DataError: One side is missing, or the shapes differ.
    """
    if images is None or references is None:
        raise DataError(f"The metric '{metric}' compares images with their originals; give both.")
    if images.shape != references.shape:
        raise DataError(
            f"The metric '{metric}' was given images of shape {tuple(images.shape)} and originals of shape "
            f"{tuple(references.shape)}; give both in one shape."
        )
    return to_levels(images), to_levels(references)
