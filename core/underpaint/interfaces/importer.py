"""Importers: published weights of other projects to models of this one."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from underpaint.interfaces.component import Component

__all__ = ["Importer"]


class Importer(Component, ABC):
    """Files of another project to a model in our conventions.

    An importer is strict: every tensor of the source is mapped, or listed by the importer as one that is left out for a
    stated reason; anything else is refused. Direction and scale of time, sign of the prediction and scale of the pixels
    are converted, so that the result needs no knowledge of where it came from.
    """

    @abstractmethod
    def read(self, source: str) -> nn.Module:
        """Return the model, in evaluation mode on the CPU.

        Args:
            source: File, folder or fsspec URL in the other project's layout.

        Returns:
            An `underpaint.Tokenizer` or an `underpaint.Denoiser`, its parts made with `underpaint.create`.

        Raises:
            DataError: The source is not of that layout; the message names the first keys that do not fit.
        """
