"""What a stage writes while it trains: ``metrics.jsonl``, ``skipped.jsonl``, trackers, a bar or plain lines."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from underpaint.config.recipe import write_atomically
from underpaint.interfaces.tracker import Tracker

__all__ = ["StageLog", "format_line", "read_rows"]

_logger = logging.getLogger("underpaint")

_RATES = (
    "lr", "grad_norm", "images_per_second", "mfu", "data_wait", "memory_gib", "seconds", "eta", "skipped",
    "skipped_jump",
)  # fmt: skip


class StageLog:
    """Log of one stage, on the main rank. Rows after a resumed step are dropped, so steps never repeat.

    Args:
        folder: Folder of the stage.
        stage: Its name.
        steps: Steps in all.
        start: Steps already done.
        trackers: Trackers beside ``metrics.jsonl``.
    """

    def __init__(self, folder: Path, stage: str, *, steps: int, start: int, trackers: Sequence[Tracker] = ()) -> None:
        self._stage = stage
        self._steps = steps
        self._trackers = list(trackers)
        self._rows = _Rows(folder / "metrics.jsonl", start)
        self._skipped = _Rows(folder / "skipped.jsonl", start)
        self._bar = (
            tqdm(total=steps, initial=start, desc=stage, unit="step", dynamic_ncols=True, leave=True)
            if sys.stderr.isatty()
            else None
        )

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Record the numbers of a logging step."""
        self._rows.add({"step": step, **values})
        for tracker in self._trackers:
            tracker.scalars(step, {f"{self._stage}/{name}": value for name, value in values.items()})
        line = format_line(step, self._steps, values)
        if self._bar is not None:
            # The bar itself shows the steps.
            self._bar.set_postfix_str(line.partition("  ")[2], refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            _tell(f"{self._stage} {line}")

    def skipped(self, step: int, samples: Sequence[str]) -> None:
        """Record the names of the samples of a step that changed nothing."""
        self._skipped.add({"step": step, "samples": list(samples)})

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """Hand a picture to the trackers."""
        for tracker in self._trackers:
            tracker.image(step, f"{self._stage}/{name}", image)

    def close(self) -> None:
        """Write out everything."""
        self._rows.close()
        self._skipped.close()
        if self._bar is not None:
            self._bar.close()


class _Rows:
    """Appends rows to a file of JSON lines, made with its first row; a full disk delays them and ends no training."""

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        self._file: io.FileIO | None = None
        self._pending = b""
        self._fails = False
        if path.exists():
            kept = [row for row in read_rows(path) if row["step"] <= start]
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))

    def add(self, row: Mapping[str, Any]) -> None:
        self._pending += (json.dumps(row) + "\n").encode()
        self._write()

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file = io.FileIO(self._path, "a")
            while self._pending:
                # The system may take a part only; without the rest the line, and all after it, would be lost.
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._fails:
                _logger.warning("'%s' cannot be written (%s); training goes on, and its lines wait.", self._path, error)
            self._fails = True
        else:
            self._fails = False

    def close(self) -> None:
        if self._pending:
            self._write()
        if self._file is not None:
            with self._file, contextlib.suppress(OSError):
                os.fsync(self._file.fileno())


def _tell(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        # The output of a batch job is a file too, and often on the disk that is full.
        pass


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read such a file; a last line that a crash cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _is_short(name: str) -> bool:
    # Ten losses by tenths of the time would fill the line; they are in the file and the trackers.
    return name not in _RATES and not name.startswith("loss_t/")


def format_line(step: int, steps: int, values: Mapping[str, float]) -> str:
    """Return one plain log line: step, loss terms, learning rate, gradient norm, rates, time left."""
    parts = [f"{step}/{steps}"]
    parts += [f"{name} {value:.4g}" for name, value in values.items() if _is_short(name)]
    shown = {
        "lr": "lr {:.2e}",
        "grad_norm": "|g| {:.3g}",
        "images_per_second": "{:.0f} img/s",
        "mfu": "MFU {:.1%}",
        "data_wait": "data {:.0%}",
        "memory_gib": "{:.2f} GiB",
    }
    parts += [form.format(values[name]) for name, form in shown.items() if name in values]
    if values.get("skipped"):
        parts.append(f"skipped {values['skipped']:.0f}")
    eta = values.get("eta", math.nan)
    if math.isfinite(eta):
        parts.append(f"ETA {int(eta) // 3600}:{int(eta) // 60 % 60:02d}:{int(eta) % 60:02d}")
    return "  ".join(parts)
