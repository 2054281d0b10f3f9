"""Ends a stage when nothing gets better any more."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from underpaint.config.recipe import write_atomically
from underpaint.config.stages import StopConfig
from underpaint.training.ranks import Ranks

__all__ = ["StopRule"]

_log = logging.getLogger("underpaint")


class StopRule:
    """Watches held-out metrics, and says when none of them got better, or moved, for long enough.

    What was measured is kept in a file of the stage, so a resumed stage decides as an uninterrupted one does. A full
    disk delays the file and ends no training.

    Args:
        config: Metrics, interval, patience.
        path: The file, one JSON line for each measurement.
        measure: Measures now, on every rank: by name, the value and whether higher is better, None where a change in
            either direction counts. What rank 0 measured counts.
        ranks: The processes.
    """

    def __init__(
        self,
        config: StopConfig,
        path: Path,
        measure: Callable[[], Mapping[str, tuple[float, bool | None]]],
        ranks: Ranks,
    ) -> None:
        self._config = config
        self._path = path
        self._measure = measure
        self._ranks = ranks
        text = path.read_text(encoding="utf-8") if ranks.is_main and path.exists() else ""
        self._rows: list[tuple[int, dict[str, tuple[float, bool | None]]]] = ranks.broadcast_object(
            [(row["step"], row["values"]) for row in map(json.loads, text.splitlines())]
        )

    def rewind(self, step: int) -> None:
        """Forget what was measured after a step: training goes on from there."""
        self._rows = [row for row in self._rows if row[0] <= step]

    def __call__(self, step: int) -> bool:
        """Measure if it is time to, and return whether the stage may end."""
        if step % self._config.every:
            return False
        self._rows.append((step, self._ranks.broadcast_object(dict(self._measure()))))
        if self._ranks.is_main:
            self._write()
        return self.met

    def _write(self) -> None:
        lines = [json.dumps({"step": at, "values": values}) for at, values in self._rows]
        try:
            write_atomically(self._path, "\n".join(lines) + "\n")
        except OSError as error:
            _log.warning("'%s' cannot be written (%s); training goes on, and its lines wait.", self._path, error)

    @property
    def met(self) -> bool:
        """Whether no value improved by more than the tolerance within the last `patience` steps."""
        if not self._rows:
            return False
        latest = self._rows[-1][0]
        return all(latest - self._last_change(name) >= self._config.patience for name in self._rows[-1][1])

    def _last_change(self, name: str) -> int:
        history = [(step, *values[name]) for step, values in self._rows]
        when, best, _ = history[0]
        for step, value, higher in history[1:]:
            change = value - best
            gain = abs(change) if higher is None else change if higher else -change
            # Nothing is a share better than a number that is not finite; anything is better than none.
            least = self._config.tolerance * abs(best) if math.isfinite(best) else 0.0
            if math.isnan(best) or gain > least:
                when, best = step, value
        return when
