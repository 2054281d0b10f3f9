"""PSNR and SSIM: image by image, against the original."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from underpaint import DataError, Metric
from underpaint_metrics.images import LEVELS, to_pair

__all__ = ["DATA_RANGE", "PSNR", "SSIM", "MeanOverImages", "psnr", "ssim"]

DATA_RANGE = 255.0
PSNR_CAP = 100.0
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1 = 0.01
SSIM_K2 = 0.03


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image in dB: 10·log10(255² / MSE), at most `PSNR_CAP`.

    The MSE runs over all pixels and channels. The cap gives identical images, whose ratio is infinite, a
    value that can be averaged.

    Args:
        images: B×3×H×W levels, 0 to 255.
        references: The originals, of that shape.

    Returns:
        B values, float64.
    """
    error = (images.double() - references.double()).square().flatten(1).mean(1)
    return (10.0 * torch.log10(DATA_RANGE**2 / error)).clamp(max=PSNR_CAP)


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Return the structural similarity of each image (Wang et al. 2004, §III-B).

    Gaussian window of 11 px with σ = 1.5, K1 = 0.01, K2 = 0.03; the mean runs over the channels and over the
    positions at which the window lies inside the image, so no padding is involved.

    Args:
        images: B×3×H×W levels, 0 to 255; H and W at least 11.
        references: The originals, of that shape.

    Returns:
        B values, float64.

    Raises:
        DataError: The images are smaller than the window.
    """
    height, width = images.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise DataError(f"SSIM needs images of at least {SSIM_WINDOW}×{SSIM_WINDOW} px, not {height}×{width}.")
    # A variance is taken as the difference of two large numbers, hence double precision.
    x, y = images.double(), references.double()
    channels = x.shape[1]
    offsets = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    window = (window / window.sum()).expand(5 * channels, 1, 1, SSIM_WINDOW)
    moments = torch.cat([x, y, x * x, y * y, x * y], dim=1)
    moments = F.conv2d(moments, window, groups=5 * channels)
    moments = F.conv2d(moments, window.transpose(2, 3), groups=5 * channels)
    mean_x, mean_y, square_x, square_y, product = moments.chunk(5, dim=1)
    covariance = product - mean_x * mean_y
    variances = square_x - mean_x.square() + square_y - mean_y.square()
    c1, c2 = (SSIM_K1 * DATA_RANGE) ** 2, (SSIM_K2 * DATA_RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    similarity: Tensor = luminance * (2 * covariance + c2) / (variances + c2)
    return similarity.flatten(1).mean(1)


class MeanOverImages(Metric):
    """Averages a value per image over all images of all ranks."""

    paired = True
    higher_is_better = True
    name: ClassVar[str]
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self._images: int | None = None

    @abstractmethod
    def score(self, images: Tensor, references: Tensor) -> Tensor:
        """Return one value per image, from B×3×H×W uint8 levels."""

    def update(self, images: Tensor | None, references: Tensor | None) -> None:
        """Add images in [-1, 1] and their originals, both B×3×H×W.

        Raises:
            DataError: A side is missing, the shapes differ, or a value is not finite.
        """
        levels, originals = to_pair(images, references, self.name)
        if len(levels):
            self.total += self.score(levels.to(self.device), originals.to(self.device)).sum()
            self.count += len(levels)

    def compute(self) -> dict[str, float]:
        """Return the mean over the images of all ranks.

        Raises:
            DataError: No image was given.
        """
        self._images = int(self.count)
        if not self._images:
            raise DataError(f"The metric '{self.name}' was given no images; call update with some before compute.")
        return {self.name: float(self.total) / self._images}

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        self._images = None

    def protocol(self) -> Mapping[str, Any]:
        """Return the constants, and the number of images of the last `compute` (None before it)."""
        return {"metric": self.name, "levels": LEVELS, "data_range": DATA_RANGE, "images": self._images}


class PSNR(MeanOverImages):
    """Mean over the images of `psnr`, as ``psnr`` in dB."""

    name = "psnr"

    def score(self, images: Tensor, references: Tensor) -> Tensor:
        """Return `psnr`."""
        return psnr(images, references)

    def protocol(self) -> Mapping[str, Any]:
        """Return the constants, and the number of images of the last `compute` (None before it)."""
        return {**super().protocol(), "mean": "of each image's value in dB", "cap": PSNR_CAP}


class SSIM(MeanOverImages):
    """Mean over the images of `ssim`, as ``ssim``."""

    name = "ssim"

    def score(self, images: Tensor, references: Tensor) -> Tensor:
        """Return `ssim`."""
        return ssim(images, references)

    def protocol(self) -> Mapping[str, Any]:
        """Return the constants, and the number of images of the last `compute` (None before it)."""
        return {
            **super().protocol(),
            "mean": "of each image's value, over channels and windows inside the image",
            "window": f"Gaussian, {SSIM_WINDOW} px, sigma {SSIM_SIGMA}",
            "k1": SSIM_K1,
            "k2": SSIM_K2,
        }
