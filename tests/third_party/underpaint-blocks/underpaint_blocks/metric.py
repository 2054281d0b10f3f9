"""The metric."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from underpaint import DataError, Metric


class Mae(Metric):
    """Mean absolute error of the pixels, in units of the [-1, 1] range."""

    paired: ClassVar[bool] = True
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images: Tensor | None, references: Tensor | None) -> None:
        """Add images and their originals."""
        if images is None or references is None:
            raise DataError("'mae' compares images with their originals; give it both.")
        self.total += (images - references).abs().double().mean((1, 2, 3)).sum()
        self.count += len(images)

    def compute(self) -> dict[str, float]:
        """Return ``mae``."""
        return {"mae": float(self.total / self.count)}

    def protocol(self) -> Mapping[str, Any]:
        """Return the range."""
        return {"range": [-1, 1]}
