"""Metrics: numbers about images, correct across ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torchmetrics
from torch import Tensor

from underpaint.interfaces.component import Component

__all__ = ["Metric"]


class Metric(torchmetrics.Metric, Component, ABC):
    """A torchmetrics metric over images in [-1, 1].

    State is declared with ``add_state``, so that it is reduced across ranks.

    Attributes:
        paired: True when image i of `images` is compared with image i of `references` (PSNR); False when
            the two are samples of two distributions (Fréchet distances).
        needs_references: Whether reference images must be given; False when the metric has its own reference.
        higher_is_better: As in torchmetrics.
    """

    paired: ClassVar[bool]
    needs_references: bool = True
    full_state_update = False

    @abstractmethod
    def update(self, images: Tensor | None, references: Tensor | None) -> None:
        """Add B×3×H×W images, and the originals or reference images.

        An unpaired metric accepts None for either side; a paired one needs both, of one shape.
        """

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Return the values by name, over everything added on all ranks."""

    @abstractmethod
    def protocol(self) -> Mapping[str, Any]:
        """Return what makes the numbers comparable: feature extractor, weights hash, resize, constants."""
