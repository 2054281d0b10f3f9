"""What a run has measured and how long its steps took, kept from session to session."""

from __future__ import annotations

import io
import logging
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from underpaint.config.recipe import write_atomically
from underpaint.errors import UnderpaintError
from underpaint.evaluation.measure import Shown
from underpaint.evaluation.protocol import Number, read_numbers, write_numbers
from underpaint.run import provenance
from underpaint.run.session import Session
from underpaint.training.loop import Stopped

__all__ = ["Kept"]

_log = logging.getLogger("underpaint")


class Kept:
    """Numbers, pictures and times of a run; `write` keeps them, so that an interrupted run has a report too.

    What earlier sessions measured of stages that are still there is taken over, if it was measured on the same images.

    Args:
        session: The run.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._folder = session.folder
        self._numbers: dict[str, Number] = {}
        self._pictures: dict[str, Any] = {}
        self._samples: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}
        if session.ranks.is_main:
            self._take_over()

    def _take_over(self) -> None:
        self._seconds = provenance.seconds(self._folder.provenance)
        path, pictures = self._folder.report / "numbers.json", self._folder.samples / "reconstructions.npz"
        if not path.exists():
            return
        try:
            numbers = read_numbers(path)
            arrays = _read_arrays(pictures) if pictures.exists() else {}
        except (UnderpaintError, OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            _log.warning("What earlier sessions measured cannot be read and is left out: %s", error)
            return
        images = self._session.data.fingerprint("validation")
        if all(number.protocol.get("data_hash") == images for number in numbers):
            self._numbers = {number.name: number for number in numbers if self._is_there(number)}
            gone = {f"reconstructions_{name}" for name in self._stages() if not self._folder.is_finished(name)}
            self._pictures = {name: array for name, array in arrays.items() if name not in gone}

    def _stages(self) -> list[str]:
        return [stage.name for stage in self._session.recipe.stages]

    def _is_there(self, number: Number) -> bool:
        for stage in self._stages():
            if number.name.endswith(f" after {stage}"):
                return self._folder.is_finished(stage)
        return self._session.recipe.diffusion is None or (self._folder.generator / "config.json").exists()

    def reconstructed(self, numbers: list[Number], shown: Shown, stage: str | None) -> None:
        """Take what was measured of reconstructions after a stage, or of a tokenizer that no stage trains."""
        self._numbers |= {number.name: number for number in numbers}
        later: list[str] = []
        if stage is not None:
            self._pictures[f"reconstructions_{stage}"] = shown.images
            later = self._stages()[self._stages().index(stage) + 1 :]
        # Those of the whole run are its last stage's.
        if not any(f"reconstructions_{name}" in self._pictures for name in later):
            self._pictures |= {"originals": shown.originals, "reconstructions": shown.images, "latents": shown.latents}

    def sampled(self, numbers: list[Number], shown: Shown, classes: tuple[str, ...]) -> None:
        """Take what was measured of samples; `classes` are the names of their labels."""
        self._numbers |= {number.name: number for number in numbers}
        asked: dict[str, Any] = {"captions": np.array(shown.captions)}
        if shown.captions is None:
            asked = {"labels": shown.labels, "classes": np.array(classes or ("",))}
        self._samples = {"images": shown.images, **asked}

    @contextmanager
    def timed(self, name: str, *, anew: bool = False) -> Iterator[None]:
        """Add the time of the block to a step's, or let it begin `anew`; a stop by a signal counts too."""
        if anew:
            self._seconds.pop(name, None)
        start = time.perf_counter()
        try:
            yield
        except Stopped:
            self._add(name, start)
            raise
        self._add(name, start)

    def _add(self, name: str, start: float) -> None:
        self._seconds[name] = round(self._seconds.get(name, 0.0) + time.perf_counter() - start, 1)
        if self._session.ranks.is_main:
            provenance.update(self._folder.provenance, seconds=self._seconds)

    def write(self) -> None:
        """Write what is known so far, on rank 0."""
        if not self._session.ranks.is_main:
            return
        self._folder.samples.mkdir(exist_ok=True)
        write_numbers(self._folder.report / "numbers.json", self._numbers.values())
        for name, arrays in (("reconstructions", self._pictures), ("samples", self._samples)):
            if arrays:
                file = io.BytesIO()
                np.savez_compressed(file, **arrays)
                write_atomically(self._folder.samples / f"{name}.npz", file.getvalue())
        provenance.update(self._folder.provenance, seconds=self._seconds)


def _read_arrays(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
