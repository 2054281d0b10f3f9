"""Datasets: sources of samples with random access."""

from __future__ import annotations

from abc import ABC, abstractmethod

import attrs
import numpy as np
from numpy.typing import NDArray

from underpaint.interfaces.component import Component

__all__ = ["Dataset", "Sample"]


@attrs.frozen(eq=False)
class Sample:
    """One sample.

    Attributes:
        image: H×W×3 uint8, RGB.
        key: Name of the sample, unique in its data set.
        label: Class index, or None.
        text: Caption, or None.
    """

    image: NDArray[np.uint8]
    key: str
    label: int | None = None
    text: str | None = None


class Dataset(Component, ABC):
    """A source of samples, read at any position by any process.

    Instances are pickled into worker processes: open files lazily, never in the constructor's state.

    Attributes:
        classes: Name of each label, in the order of the labels; empty when there are none.
        has_text: Whether samples carry captions.
    """

    classes: tuple[str, ...] = ()
    has_text: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples, broken ones included."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Read one sample.

        Raises:
            BrokenImageError: The sample cannot be decoded.
        """

    def short_side(self, index: int) -> int:
        """Return the short side of an image in pixels; this reads the whole image, for want of anything faster.

        Raises:
            BrokenImageError: It cannot be told.
        """
        return int(min(self[index].image.shape[:2]))

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of what the data set consists of, cheap to compute, stable between runs."""
