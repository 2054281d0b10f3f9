"""What is known of a cell that was run: the file ``cell.json`` in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import attrs

from underpaint.bench.matrix import Cell
from underpaint.config.recipe import write_atomically
from underpaint.config.structure import structure, unstructure
from underpaint.errors import DataError, NotFoundError, suggest

__all__ = ["MEASURED", "CellRecord", "cell_folder", "read_record", "select_cells", "write_record"]

MEASURED = Path("report") / "bench.json"
"""Where in its folder a cell keeps sizes and speed of its models, as numbers with their protocol."""


@attrs.frozen(kw_only=True)
class CellRecord:
    """What happened to a cell.

    Attributes:
        identity: `Cell.identity` of what was run.
        state: ``running`` also stands where the matrix was killed.
        trained: Whether the run itself is finished, and only the timing of the tokenizer may be missing.
        reason: Why it failed, in a sentence.
        log: Last lines that a failed cell printed.
        seconds: Wall time of all attempts.
        attempts: How often it was started.
    """

    identity: str
    state: Literal["running", "finished", "failed", "interrupted"] = "running"
    trained: bool = False
    reason: str = ""
    log: tuple[str, ...] = ()
    seconds: float = 0.0
    attempts: int = 0


def cell_folder(out: Path, cell: Cell) -> Path:
    """Return the run folder of a cell."""
    return out / "cells" / cell.folder


def read_record(out: Path, cell: Cell) -> CellRecord | None:
    """Return what is known of a cell; None when it was never started.

    Raises:
        DataError: The file is damaged.
    """
    path = cell_folder(out, cell) / "cell.json"
    try:
        return structure(json.loads(path.read_text(encoding="utf-8")), CellRecord, "")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read ({error}); delete it, and the cell is measured again.") from error


def write_record(out: Path, cell: Cell, record: CellRecord) -> None:
    """Replace what is known of a cell."""
    text = json.dumps(unstructure(record), indent=2, ensure_ascii=False) + "\n"
    write_atomically(cell_folder(out, cell) / "cell.json", text)


def select_cells(cells: Sequence[Cell], patterns: Iterable[str]) -> list[Cell]:
    """Return the cells that match one of the patterns, and those whose tokenizers they load; all for no patterns.

    Raises:
        NotFoundError: A pattern matches nothing.
    """
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(cell.name, pattern) for cell in cells):
            raise NotFoundError(f"No cell matches '{pattern}'. {suggest(pattern, [cell.name for cell in cells])}")
    wanted = {cell.name for cell in cells if not patterns or any(fnmatchcase(cell.name, p) for p in patterns)}
    # A cell loads from earlier ones only.
    for cell in reversed(cells):
        if cell.name in wanted and cell.loads is not None:
            wanted.add(cell.loads)
    return [cell for cell in cells if cell.name in wanted]
