"""The folder of a matrix: whether its report may be written there."""

from __future__ import annotations

import json
from pathlib import Path

from underpaint.errors import ConfigError

__all__ = ["RESULTS", "check_place"]

RESULTS = "results.json"
"""What a report has measured; it names the matrix, so that the other files are known as its."""

_OTHERS = ("report.html", "report.md", "figures")


def check_place(out: Path, name: str) -> None:
    """Refuse a folder in which the report of a matrix would replace somebody else's files.

    Args:
        out: Folder of the matrix; may not exist yet.
        name: Name of the matrix.

    Raises:
        ConfigError: It is a file, or holds the report of another matrix or files that are named like one.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"'{out}' is a file, and a matrix becomes a folder; choose another --out.")
    found = out / RESULTS
    if not found.exists():
        strange = next((out / other for other in _OTHERS if (out / other).exists()), None)
        if strange is not None:
            raise ConfigError(f"'{strange}' exists and belongs to no report of a matrix; choose another --out.")
        return
    try:
        owner = json.loads(found.read_text(encoding="utf-8"))["matrix"]["name"]
    except (OSError, ValueError, TypeError, KeyError):
        raise ConfigError(f"'{found}' exists and holds no results of a matrix; choose another --out.") from None
    if owner != name:
        raise ConfigError(f"'{found}' holds the results of matrix '{owner}', not of '{name}'; choose another --out.")
