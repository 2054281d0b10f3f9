"""TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from underpaint import Tracker

__all__ = ["TensorBoard"]


class TensorBoard(Tracker):
    """Writes event files into its folder. A resumed run adds a file; nothing written before is touched."""

    def __init__(self, *, folder: Path, run: str) -> None:
        self._writer = SummaryWriter(log_dir=str(folder))
        self._run = run

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record each number under its name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """Record an H×W×3 picture."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is pending."""
        self._writer.close()
