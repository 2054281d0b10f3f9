"""``underpaint bench``: a matrix of recipes, and its report."""

from __future__ import annotations

import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import click

from underpaint.bench.cells import read_record, select_cells
from underpaint.bench.matrix import Cell, MatrixConfig, read_matrix, resolve_cells
from underpaint.bench.place import check_place
from underpaint.cli.output import print_json, print_table
from underpaint.errors import ConfigError

__all__ = ["bench"]

_matrix = click.argument("matrix", type=click.Path(path_type=Path))
_overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
_out = click.option("--out", type=click.Path(path_type=Path), help="Folder of the matrix.  [default: runs/NAME]")
_force = click.option("--force", is_flag=True, help="Compare numbers of different protocols in one column.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def bench() -> None:
    """Run a matrix of recipes, and compare them in one report."""


@bench.command()
@_matrix
@_overrides
@_out
@click.option("--only", multiple=True, metavar="GLOB", help="Only cells of such names; repeatable.")
@click.option("--list", "listed", is_flag=True, help="Say what would be run, and stop.")
@click.option(
    "--launcher",
    default="",
    metavar="COMMAND",
    help="Starts each training in place of 'python -m', such as 'torchrun --nproc-per-node 8 -m'.",
)
@_force
@_json
def run(
    matrix: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    only: tuple[str, ...],
    listed: bool,
    launcher: str,
    force: bool,
    as_json: bool,
) -> None:
    """Run the cells of a matrix, each in a process and a run folder of its own, and write the report.

    MATRIX is a YAML file; KEY=VALUE pairs change every cell. Finished cells are taken as they are, interrupted ones go
    on, and those that failed are tried again. Exit code 1 says that a cell failed.
    """
    config, cells = _resolve(matrix, overrides)
    place = _place(out, config)
    wanted = select_cells(cells, only)
    if listed:
        _list(wanted, place, as_json)
        return
    start = shlex.split(launcher)
    if start and shutil.which(start[0]) is None:
        raise ConfigError(f"--launcher starts with '{start[0]}', and there is no such program here.")

    from underpaint.bench.runner import run_cells

    done = run_cells(wanted, place, start, lambda line: click.echo(line, err=True))
    if done.stopped is not None:
        raise click.exceptions.Exit(128 + signal.Signals[done.stopped].value)
    _report(config, cells, place, force, as_json)
    if done.failed or done.blocked:
        raise click.exceptions.Exit(1)


@bench.command()
@_matrix
@_overrides
@_out
@_force
@_json
def report(matrix: Path, overrides: tuple[str, ...], out: Path | None, force: bool, as_json: bool) -> None:
    """Write the report of a matrix: report.html, report.md and results.json.

    Takes the same KEY=VALUE pairs as the run. Cells that failed or were not run are listed as such.
    """
    config, cells = _resolve(matrix, overrides)
    place = _place(out, config)
    if not (place / "cells").is_dir():
        raise ConfigError(f"No cell of matrix '{config.name}' was run in '{place}'; run it, or give its --out.")
    _report(config, cells, place, force, as_json)


def _resolve(path: Path, overrides: tuple[str, ...]) -> tuple[MatrixConfig, list[Cell]]:
    config = read_matrix(path)
    return config, resolve_cells(config, overrides)


def _place(out: Path | None, config: MatrixConfig) -> Path:
    place = (out or Path("runs") / config.name).expanduser()
    check_place(place, config.name)
    return place


def _list(cells: list[Cell], out: Path, as_json: bool) -> None:
    rows: list[dict[str, Any]] = []
    for cell in cells:
        record = read_record(out, cell)
        known = record is not None and record.identity == cell.identity
        state = record.state if record is not None and known else "not run"
        rows.append({"name": cell.name, "state": state, "recipe": cell.source, "overrides": list(cell.overrides)})
    if as_json:
        print_json(rows)
    else:
        print_table(
            [[row["name"], row["state"], row["recipe"], " ".join(row["overrides"])] for row in rows],
            ["cell", "state", "recipe", "overrides"],
        )


def _report(config: MatrixConfig, cells: list[Cell], out: Path, force: bool, as_json: bool) -> None:
    from underpaint.bench.page import write_matrix_report
    from underpaint.bench.results import plain_results, read_results

    results = read_results(config, cells, out)
    page = write_matrix_report(results, force=force)
    if as_json:
        print_json(plain_results(results))
    else:
        click.echo(f"Report: {page}")
