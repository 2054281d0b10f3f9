"""How commands print: JSON for programs, aligned columns for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

__all__ = ["print_json", "print_table"]


def print_json(value: Any) -> None:
    """Print plain values as indented JSON; what is not plain is written as text."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(rows: Sequence[Sequence[Any]], headers: Sequence[str], *, err: bool = False) -> None:
    """Print rows as columns of text, numbers to the right; nothing for no rows but the headers.

    Args:
        rows: The cells of each.
        headers: Name of each column.
        err: Print to stderr, where stdout holds something for programs.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(headers), *cells]) for i in range(len(headers))]
    numeric = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(headers))]

    def line(texts: Sequence[str]) -> str:
        parts = [t.rjust(w) if n else t.ljust(w) for t, w, n in zip(texts, widths, numeric, strict=True)]
        return "  ".join(parts).rstrip()

    for row in (headers, ["-" * width for width in widths], *cells):
        click.echo(line(row), err=err)
