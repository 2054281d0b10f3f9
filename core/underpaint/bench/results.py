"""What the cells of a matrix have measured, and which numbers may stand in one column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from underpaint.bench.cells import MEASURED, CellRecord, cell_folder, read_record
from underpaint.bench.matrix import Cell, MatrixConfig
from underpaint.config.recipe import dump_recipe
from underpaint.config.structure import unstructure
from underpaint.evaluation.protocol import Number, read_numbers
from underpaint.report.facts import RunFacts, read_run
from underpaint.report.words import protocol_lines

__all__ = ["CellResult", "Column", "Results", "columns", "plain_results", "read_results"]

_FORMAT = 1
_AFTER = " after "
_NAMED = 3


@attrs.frozen(kw_only=True, eq=False)
class CellResult:
    """A cell and what came of it.

    Attributes:
        cell: The cell.
        record: What happened to it; None when it was never started, or not with this evaluation.
        state: ``finished``, ``failed``, ``unfinished`` or ``not run``.
        why: A sentence about a state that is not ``finished``; may be empty.
        run: What its run left; None unless it is finished.
        final: What the run measured: reconstructions after the last stage that was measured, samples.
        models: Sizes and speed of its models.
        stages: Its numbers by the stage after which they were measured.
    """

    cell: Cell
    record: CellRecord | None
    state: str
    why: str
    run: RunFacts | None = None
    final: Sequence[Number] = ()
    models: Sequence[Number] = ()
    stages: Mapping[str, Sequence[Number]] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True, eq=False)
class Results:
    """A matrix and what came of it.

    Attributes:
        matrix: The matrix.
        out: Its folder.
        cells: Its cells, in order.
        others: Folders of cells of other settings.
    """

    matrix: MatrixConfig
    out: Path
    cells: Sequence[CellResult]
    others: Sequence[str]


@attrs.frozen(kw_only=True, eq=False)
class Column:
    """Numbers that may be compared.

    Attributes:
        name: Of the numbers.
        note: In what their protocol differs from that of other columns of this name; empty when there is no other.
        protocols: Protocols by their id: one, unless columns were joined by force.
        values: The numbers by row.
        best: Rows of the best value; empty when none is better or there is one only.
    """

    name: str
    note: str
    protocols: Mapping[str, Mapping[str, Any]]
    values: Mapping[Any, Number]
    best: frozenset[Any]


def read_results(matrix: MatrixConfig, cells: Sequence[Cell], out: Path) -> Results:
    """Read what the cells of a matrix have left in its folder.

    Raises:
        DataError: A file of a cell is damaged.
    """
    states: dict[str, str] = {}
    results = []
    for cell in cells:
        result = _read_cell(cell, out, states)
        states[cell.name] = result.state
        results.append(result)
    known = {cell.folder for cell in cells}
    others = sorted(path.parent.name for path in out.glob("cells/*/cell.json") if path.parent.name not in known)
    return Results(matrix=matrix, out=out, cells=results, others=others)


def _read_cell(cell: Cell, out: Path, states: Mapping[str, str]) -> CellResult:
    record = read_record(out, cell)
    if record is None or record.identity != cell.identity:
        why = "" if record is None else "it was measured with another evaluation"
        if cell.loads is not None and states.get(cell.loads) != "finished":
            why = f"it loads the tokenizer of '{cell.loads}', which is not finished"
        return CellResult(cell=cell, record=None, state="not run", why=why)
    if record.state != "finished":
        state = "failed" if record.state == "failed" else "unfinished"
        return CellResult(cell=cell, record=record, state=state, why=record.reason)
    folder = cell_folder(out, cell)
    run = read_run(folder)
    final, stages = _split(run.numbers)
    models = read_numbers(folder / MEASURED)
    return CellResult(
        cell=cell, record=record, state="finished", why="", run=run, final=final, models=models, stages=stages
    )


def _split(numbers: Iterable[Number]) -> tuple[list[Number], dict[str, list[Number]]]:
    """Return the numbers of each name after its last stage, and all by stage; both without the stage in the name."""
    parts = [(number, *number.name.partition(_AFTER)[::2]) for number in numbers]
    last = {name: stage for _, name, stage in parts}
    final = [attrs.evolve(number, name=name) for number, name, stage in parts if stage == last[name]]
    stages: dict[str, list[Number]] = {}
    for number, name, stage in parts:
        if stage:
            stages.setdefault(stage, []).append(attrs.evolve(number, name=name))
    return final, stages


def columns(rows: Mapping[Any, Sequence[Number]], *, force: bool = False) -> list[Column]:
    """Sort numbers into columns of one name and one protocol.

    Args:
        rows: Numbers by row.
        force: Join the protocols of a name, and compare them all the same.

    Returns:
        Columns in the order in which their names, and then their protocols, first appear.
    """
    names = list(dict.fromkeys(number.name for numbers in rows.values() for number in numbers))
    found: dict[str, dict[str, dict[Any, Number]]] = {name: {} for name in names}
    for row, numbers in rows.items():
        for number in numbers:
            found[number.name].setdefault("" if force else number.id, {})[row] = number
    made = []
    for name, groups in found.items():
        notes = _notes([next(iter(values.values())).protocol for values in groups.values()])
        for note, values in zip(notes, groups.values(), strict=True):
            protocols = {number.id: number.protocol for number in values.values()}
            made.append(Column(name=name, note=note, protocols=protocols, values=values, best=_best(values)))
    return made


def _notes(protocols: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say of each protocol in what it differs from the others."""
    lines = [dict(protocol_lines(protocol)) for protocol in protocols]
    keys = list(dict.fromkeys(key for line in lines for key in line))
    different = [key for key in keys if len({line.get(key) for line in lines}) > 1]
    more = f" and {len(different) - _NAMED} more" if len(different) > _NAMED else ""
    return ["; ".join(f"{key} {line.get(key, 'none')}" for key in different[:_NAMED]) + more for line in lines]


def _best(values: Mapping[Any, Number]) -> frozenset[Any]:
    directions = {number.higher_is_better for number in values.values()}
    if len(values) < 2 or len(directions) > 1 or None in directions:
        return frozenset()
    choose = max if directions == {True} else min
    best = choose(number.value for number in values.values())
    rows = frozenset(row for row, number in values.items() if number.value == best)
    return rows if len(rows) < len(values) else frozenset()


# --------------------------------------------------------------------------------------------- as JSON


def plain_results(results: Results) -> dict[str, Any]:
    """Return everything as plain values."""
    matrix = results.matrix
    return {
        "format": _FORMAT,
        "matrix": {"name": matrix.name, "about": matrix.about},
        "cells": [_plain_cell(result, results.out) for result in results.cells],
        "published": [unstructure(item) for item in matrix.published],
        "cells of other settings": list(results.others),
    }


def _plain_cell(result: CellResult, out: Path) -> dict[str, Any]:
    cell, record, run = result.cell, result.record, result.run
    plain: dict[str, Any] = {
        "name": cell.name,
        "choices": dict(cell.choices),
        "source": cell.source,
        "overrides": list(cell.overrides),
        "loads": cell.loads,
        "hash": cell.hash,
        "folder": str(cell_folder(out, cell).relative_to(out)),
        "state": result.state,
        "why": result.why,
        "log": [] if record is None else list(record.log),
        "attempts": 0 if record is None else record.attempts,
        "seconds": None if record is None else record.seconds,
        "recipe": dump_recipe(cell.recipe),
    }
    if run is not None:
        plain |= {
            "numbers": [_plain_number(number) for number in (*result.final, *result.models)],
            "numbers by stage": {
                stage: [_plain_number(number) for number in numbers] for stage, numbers in result.stages.items()
            },
            "training": {stage.name: {"steps": stage.steps[-1], **attrs.asdict(stage.speed)} for stage in run.stages},
            "provenance": dict(run.provenance),
        }
    return plain


def _plain_number(number: Number) -> dict[str, Any]:
    return {
        "name": number.name,
        "value": number.value,
        "std": number.std,
        "higher_is_better": number.higher_is_better,
        "protocol_id": number.id,
        "protocol": dict(number.protocol),
    }
