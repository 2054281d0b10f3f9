"""Writes what a matrix has measured: one HTML page that needs no other file, Markdown, and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import attrs
import numpy as np
from numpy.typing import NDArray

from underpaint.bench.cells import CellRecord, cell_folder
from underpaint.bench.place import RESULTS
from underpaint.bench.results import CellResult, Column, Results, columns, plain_results
from underpaint.config.recipe import write_atomically
from underpaint.report.curves import curve_svg
from underpaint.report.facts import RunFacts
from underpaint.report.markdown import bullets, table
from underpaint.report.pictures import contact_sheet
from underpaint.report.templates import picture, template
from underpaint.report.words import MFU_CONVENTION, duration, figure, protocol_lines, speed_cells

__all__ = ["write_matrix_report"]

_SHOWN = 8
_SERIES = 8
_NONE = "–"
_COSTS = ("train img/s, all stages", "peak memory", "wall time")
_SPEED = ("Cell", "Stage", "Steps", "Batch", "img/s", "MFU", "Data wait", "Memory", "Time")


@attrs.frozen
class _Row:
    """A line of a table: its values, or a message in their place.

    Attributes:
        names: What it is about.
        values: Texts, and whether each is the best of its column.
        message: Why there are none.
        link: Address of more about it; may be empty.
    """

    names: Sequence[str]
    values: Sequence[tuple[str, bool]] = ()
    message: str = ""
    link: str = ""


@attrs.frozen(eq=False)
class _Sheet:
    """The same images by several cells: N×H×W×3 uint8 by the name of a column, originals first."""

    columns: Mapping[str, NDArray[np.uint8]]


def write_matrix_report(results: Results, *, force: bool = False) -> Path:
    """Write ``report.html``, ``report.md``, ``results.json`` and ``figures/`` into the folder of a matrix.

    Args:
        results: What to show.
        force: Compare numbers of different protocols all the same.

    Returns:
        The HTML file.
    """
    out = results.out
    runs = {result.cell.name: result.run for result in results.cells if result.run is not None}
    final = columns({r.cell.name: r.final for r in results.cells}, force=force)
    models = columns({r.cell.name: r.models for r in results.cells}, force=force)
    final += sorted(models, key=lambda column: column.name.endswith("img/s"))
    stages = columns(
        {(r.cell.name, stage): numbers for r in results.cells for stage, numbers in r.stages.items()}, force=force
    )
    sheets = _sheets(results)
    samples = {name: run.samples[:_SHOWN] for name, run in runs.items() if run.samples is not None}
    curves = _curves(runs)
    plain = json.dumps(plain_results(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # First, since it says whose the other files are.
    write_atomically(out / RESULTS, plain)
    (out / "figures").mkdir(exist_ok=True)
    files: dict[str, str] = {}
    for name, caption, data in _files(sheets, samples, curves):
        write_atomically(out / "figures" / name, data)
        files[caption] = f"figures/{quote(name)}"
    shown = {
        "matrix": results.matrix,
        "summary": _summary(results, runs, force),
        "head": ["Cell", *map(_head, final), *_COSTS],
        "rows": [_cell_row(result, final, out) for result in results.cells],
        "protocols": [(_head(c), key, protocol_lines(p)) for c in final for key, p in c.protocols.items() if p],
        "stage_head": ["Cell", "After", *map(_head, stages)],
        "stage_rows": _stage_rows(stages),
        "speed_head": _SPEED,
        "speeds": _speeds(runs),
        "convention": MFU_CONVENTION,
        "published_head": ["Published", *_published_names(results), "Source"],
        "published": _published_rows(results),
        "failed": [result for result in results.cells if result.state == "failed"],
    }
    write_atomically(out / "report.md", _markdown(shown, files))
    page = template("matrix.html.j2").render(
        **shown,
        sheets=[{name: [picture(image, "") for image in images] for name, images in s.columns.items()} for s in sheets],
        samples={name: [picture(image, "") for image in images] for name, images in samples.items()},
        curves=curves,
        recipes={name: run.config_text for name, run in runs.items()},
    )
    write_atomically(out / "report.html", page)
    return out / "report.html"


# ---------------------------------------------------------------------------------------------- tables


def _head(column: Column) -> str:
    return f"{column.name} ({column.note})" if column.note else column.name


def _value(column: Column, row: Any) -> tuple[str, bool]:
    number = column.values.get(row)
    if number is None:
        return _NONE, False
    mark = f" [{number.id[:4]}]" if len(column.protocols) > 1 else ""
    return figure(number.value, number.std) + mark, row in column.best


def _cell_row(result: CellResult, final: Sequence[Column], out: Path) -> _Row:
    name, record = result.cell.name, result.record
    if result.run is None:
        return _Row([name], message=f"{result.state}: {result.why}" if result.why else result.state)
    values = [_value(column, name) for column in final]
    values += [(text, False) for text in _costs(result.run, record)]
    place = cell_folder(out, result.cell) / "report" / "index.html"
    return _Row([name], values, link=quote(str(place.relative_to(out))) if place.exists() else "")


def _costs(run: RunFacts, record: CellRecord | None) -> tuple[str, str, str]:
    """Return what the training took; see `_COSTS`."""
    memory = [stage.speed.memory_gib for stage in run.stages if stage.speed.memory_gib is not None]
    work = [(stage.steps[-1] * int(stage.plan.get("batch", 0)), stage.speed.seconds) for stage in run.stages]
    seconds = sum(time or 0.0 for _, time in work)
    return (
        figure(sum(images for images, _ in work) / seconds, None) if seconds else _NONE,
        f"{max(memory):.2f} GiB" if memory else _NONE,
        _NONE if record is None else duration(record.seconds),
    )


def _stage_rows(stages: Sequence[Column]) -> list[_Row]:
    rows = dict.fromkeys(row for column in stages for row in column.values)
    cells = list(dict.fromkeys(cell for cell, _ in rows))
    ordered = sorted(rows, key=lambda row: cells.index(row[0]))
    return [_Row(row, [_value(column, row) for column in stages]) for row in ordered]


def _speeds(runs: Mapping[str, RunFacts]) -> list[_Row]:
    return [
        _Row(
            [name, stage.name],
            [
                (text, False)
                for text in (f"{stage.steps[-1]:,.0f}", str(stage.plan.get("batch", _NONE)), *speed_cells(stage.speed))
            ],
        )
        for name, run in runs.items()
        for stage in run.stages
    ]


def _published_names(results: Results) -> list[str]:
    return list(dict.fromkeys(name for item in results.matrix.published for name in item.values))


def _published_rows(results: Results) -> list[_Row]:
    names = _published_names(results)
    return [
        _Row(
            [item.name],
            [*((f"{item.values[n]:g}" if n in item.values else _NONE, False) for n in names), (item.source, False)],
        )
        for item in results.matrix.published
    ]


def _summary(results: Results, runs: Mapping[str, RunFacts], force: bool) -> list[str]:
    states = [result.state for result in results.cells]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    lines = [f"{len(states)} cells: {', '.join(counts)}."]
    if force:
        lines.append(
            "Numbers of different protocols stand in one column here, as asked for by --force; the protocol follows "
            "each of them."
        )
    for say in (_images, _machine):
        said: dict[str, list[str]] = {}
        for name, run in runs.items():
            said.setdefault(say(run), []).append(name)
        lines += [f"{text}." if len(said) == 1 else f"{text}: {', '.join(names)}." for text, names in said.items()]
    if results.others and not runs:
        lines.append(
            f"The folder holds {len(results.others)} cells of other settings, such as {results.others[0]}; the report "
            "takes the same KEY=VALUE as the run."
        )
    return lines


def _images(run: RunFacts) -> str:
    """Say which images a run trained on and held out, as far as its provenance tells."""
    data, size = run.provenance.get("data") or {}, (run.config.get("data") or {}).get("size")
    sides = "×".join(map(str, size if isinstance(size, list) else [size, size]))
    purposes = {"train": "to train on", "validation": "held out"}
    counts = [f"{data[p]['samples']:,} of {data[p]['name']} {text}" for p, text in purposes.items() if p in data]
    return f"Images of {sides} pixels{': ' * bool(counts)}{', '.join(counts)}"


def _machine(run: RunFacts) -> str:
    """Say where a run ran, as far as its provenance tells."""
    session = (run.provenance.get("sessions") or [{}])[-1]
    environment = dict(enumerate(run.provenance.get("environments") or [])).get(session.get("environment"), {})
    machine, versions = environment.get("machine", {}), environment.get("versions", {})
    where = ", ".join(dict.fromkeys(machine.get("gpus", []))) or f"{machine.get('cpu_cores')} CPU cores"
    ranks = f"{session.get('ranks')} × {session.get('device')}"
    return f"Ran on {where} ({ranks}) with underpaint {versions.get('underpaint')}, torch {versions.get('torch')}"


# -------------------------------------------------------------------------------------------- pictures


def _sheets(results: Results) -> list[_Sheet]:
    """Put the reconstructions of the same originals side by side, those of a shared tokenizer once."""
    sheets: dict[bytes, dict[str, NDArray[np.uint8]]] = {}
    for result in results.cells:
        pictures = {} if result.run is None else result.run.reconstructions
        last = pictures.get("reconstruction")
        if last is None:
            continue
        originals = pictures["original"][:_SHOWN]
        key = repr(originals.shape).encode() + originals.tobytes()
        sheet = sheets.setdefault(key, {"original": originals})
        shared = sheet.get(result.cell.loads or "")
        if shared is None or not np.array_equal(shared, last[:_SHOWN]):
            sheet[result.cell.name] = last[:_SHOWN]
    return [_Sheet(sheet) for sheet in sheets.values()]


def _curves(runs: Mapping[str, RunFacts]) -> dict[str, list[str]]:
    """Draw the losses of a stage of all cells over one another, as many as there are colours."""
    series: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for name, run in runs.items():
        for stage in run.stages:
            if "loss" in stage.losses:
                series.setdefault(stage.name, {})[name] = stage.losses["loss"]
    drawn = {}
    for stage_name, curves in series.items():
        names = list(curves)
        parts = [names[i : i + _SERIES] for i in range(0, len(names), _SERIES)]
        # A single curve has no legend that would say whose it is.
        of = f" of {names[0]}" if len(names) == 1 else ""
        drawn[stage_name] = [curve_svg(f"{stage_name}: loss{of}", {n: curves[n] for n in part}) for part in parts]
    return drawn


def _files(
    sheets: Sequence[_Sheet], samples: Mapping[str, NDArray[np.uint8]], curves: Mapping[str, list[str]]
) -> list[tuple[str, str, str | bytes]]:
    files: list[tuple[str, str, str | bytes]] = []
    for number, sheet in enumerate(sheets, 1):
        rows = np.stack(list(sheet.columns.values()), axis=1)
        picture_file = contact_sheet(rows.reshape(-1, *rows.shape[2:]), len(sheet.columns))
        files.append((f"reconstructions-{number}.png", f"Columns: {', '.join(sheet.columns)}.", picture_file))
    for name, images in samples.items():
        files.append((f"samples-{name}.png", f"Samples of {name}.", contact_sheet(images, _SHOWN)))
    for stage, drawn in curves.items():
        for number, svg in enumerate(drawn, 1):
            of = f", part {number}" if len(drawn) > 1 else ""
            files.append((f"loss-{stage}-{number}.svg", f"Loss of stage {stage}{of}.", svg))
    return files


# -------------------------------------------------------------------------------------------- Markdown


def _markdown(shown: Mapping[str, Any], files: Mapping[str, str]) -> str:
    matrix = shown["matrix"]
    parts = [f"# {matrix.name}", matrix.about, bullets(shown["summary"])]
    parts += ["## Results", _table(shown["head"], shown["rows"])]
    if shown["protocols"]:
        rows = [
            (head, key, "; ".join(f"{name}: {text}" for name, text in lines)) for head, key, lines in shown["protocols"]
        ]
        parts += ["## Measured how", table(("Column", "Protocol", "Measured how"), rows)]
    if shown["stage_rows"]:
        parts += ["## After every stage", _table(shown["stage_head"], shown["stage_rows"])]
    if shown["published"]:
        parts += ["## Published elsewhere, not measured here", _table(shown["published_head"], shown["published"])]
    if files:
        parts += ["## Pictures", *(f"{caption}\n\n![{caption}]({path})" for caption, path in files.items())]
    if shown["speeds"]:
        parts += ["## Training speed", _table(shown["speed_head"], shown["speeds"]), shown["convention"]]
    for result in shown["failed"]:
        parts += [f"## {result.cell.name} failed", result.why, "````\n" + "\n".join(result.record.log) + "\n````"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: Sequence[str], rows: Sequence[_Row]) -> str:
    lines = []
    for row in rows:
        values = [f"**{text}**" if best else text for text, best in row.values]
        line = [*row.names, *(values or [row.message])]
        lines.append([*line, *[""] * (len(head) - len(line))])
    return table(head, lines)
