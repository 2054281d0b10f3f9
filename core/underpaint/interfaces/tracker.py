"""Trackers: where scalars and images go during training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from underpaint.interfaces.component import Component

__all__ = ["Tracker"]


class Tracker(Component, ABC):
    """Receives what a run logs, on rank 0 only.

    Made with the context keywords ``folder`` (a path of its own inside the run) and ``run`` (its name).
    """

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record named numbers of one step."""

    @abstractmethod
    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """Record an H×W×3 uint8 picture."""

    @abstractmethod
    def close(self) -> None:
        """Write out what is pending. Called once, also after an error."""
