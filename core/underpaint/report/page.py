"""Writes the report of a run: one HTML page that needs no other file, and the same in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from underpaint.config.recipe import write_atomically
from underpaint.report.curves import curve_svg
from underpaint.report.facts import RunFacts, StageFacts, read_run
from underpaint.report.markdown import markdown
from underpaint.report.pca import latent_pca
from underpaint.report.pictures import contact_sheet, enlarge
from underpaint.report.templates import picture, template
from underpaint.report.words import MFU_CONVENTION, figure, protocol_lines, speed_cells, summary

__all__ = ["write_report"]

_OPEN = 36
_SHEET_COLUMNS = 8


def write_report(run: Path) -> Path:
    """Write ``report/index.html``, ``report/report.md`` and ``report/figures/`` from the files of a run.

    Parts whose files are missing or damaged are left out, and a sentence in the report says so.

    Args:
        run: Run folder; nothing in it but the report is changed.

    Returns:
        The HTML file.

    Raises:
        NotFoundError: There is no such folder.
    """
    facts = read_run(run)
    rows = _picture_rows(facts)
    curves = {stage.name: _curves(stage) for stage in facts.stages}
    target = run / "report"
    (target / "figures").mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    for name, caption, data in _figure_files(facts, rows, curves):
        write_atomically(target / "figures" / name, data)
        files[caption] = f"figures/{name}"
    write_atomically(target / "report.md", markdown(facts, files))
    write_atomically(target / "index.html", _html(facts, rows, curves))
    return target / "index.html"


def _picture_rows(facts: RunFacts) -> dict[str, NDArray[np.uint8]]:
    """Return the reconstructions and, last, the latents as colours, all of one size."""
    rows = dict(facts.reconstructions)
    if rows and facts.latents is not None:
        height, width = rows["original"].shape[1:3]
        rows["latent"] = enlarge(latent_pca(facts.latents), height, width)
    return rows


def _curves(stage: StageFacts) -> list[str]:
    losses = stage.losses
    terms = {name: curve for name, curve in losses.items() if name != "loss"}
    if "loss" in losses and len(terms) == 1 and str(losses["loss"]) == str(next(iter(terms.values()))):
        terms = {}  # the only term, with weight 1, is the loss itself
    pictures = [curve_svg(f"{stage.name}: loss", {"loss": losses["loss"]})] if "loss" in losses else []
    if terms:
        pictures.append(curve_svg(f"{stage.name}: loss terms", terms))
    return pictures


def _figure_files(
    facts: RunFacts, rows: Mapping[str, NDArray[np.uint8]], curves: Mapping[str, list[str]]
) -> list[tuple[str, str, str | bytes]]:
    files: list[tuple[str, str, str | bytes]] = []
    if rows:
        cells = np.stack(list(rows.values()), axis=1)
        sheet = contact_sheet(cells.reshape(-1, *cells.shape[2:]), len(rows) * max(1, _SHEET_COLUMNS // len(rows)))
        files.append(("reconstructions.png", f"Each image as: {', '.join(rows)}.", sheet))
    if facts.samples is not None:
        files.append(("samples.png", "Samples.", contact_sheet(facts.samples, _SHEET_COLUMNS)))
    for stage, pictures in curves.items():
        for kind, svg in zip(("loss", "terms"), pictures, strict=False):
            files.append((f"{stage}-{kind}.svg", f"Stage {stage}: {kind}.", svg))
    return files


def _html(facts: RunFacts, rows: Mapping[str, NDArray[np.uint8]], curves: Mapping[str, list[str]]) -> str:
    cards = [
        [picture(image, label) for label, image in zip(rows, images, strict=True)]
        for images in zip(*rows.values(), strict=True)
    ]
    names = facts.sample_names or [""] * (0 if facts.samples is None else len(facts.samples))
    samples = [] if facts.samples is None else [picture(i, n) for i, n in zip(facts.samples, names, strict=True)]
    return template("template.html.j2").render(
        facts=facts,
        summary=summary(facts),
        cards=cards,
        columns=len(rows),
        lossy=any(not picture.sharp for pictures in cards for picture in pictures),
        samples=samples,
        open_cards=max(4, _OPEN // max(1, len(rows))),
        open_samples=_OPEN,
        numbers=[(n, figure(n.value, n.std), protocol_lines(n.protocol)) for n in facts.numbers],
        curves=curves,
        bad_rows={stage.name: _bad_rows(stage) for stage in facts.stages},
        speeds=[(stage.name, speed_cells(stage.speed)) for stage in facts.stages],
        convention=MFU_CONVENTION,
        sessions=_sessions(facts.provenance),
        provenance=yaml.safe_dump(dict(facts.provenance), sort_keys=False, allow_unicode=True, width=100),
    )


def _bad_rows(stage: StageFacts) -> int:
    """Return at how many logged steps some loss is not finite."""
    return len(
        {
            step
            for steps, values in stage.losses.values()
            for step, v in zip(steps, values, strict=True)
            if not math.isfinite(v)
        }
    )


def _sessions(provenance: Mapping[str, Any]) -> str:
    """Say when and on what the run ran, as far as its provenance tells."""
    listed = provenance.get("sessions")
    sessions = [s for s in (listed if isinstance(listed, list) else []) if isinstance(s, Mapping)]
    if not sessions:
        return ""
    start, end = (_time(value) for value in (sessions[0].get("started"), sessions[-1].get("ended")))
    times = f"{start} to {end}" if end else f"started {start}"
    count = f", {len(sessions)} sessions" if len(sessions) > 1 else ""
    ranks, device = sessions[-1].get("ranks"), sessions[-1].get("device")
    return f"{times}{count}, {ranks} × {device}" if ranks and device else f"{times}{count}"


def _time(value: Any) -> str:
    try:
        return datetime.fromisoformat(value).strftime("%Y-%m-%d %H:%M %Z").strip()
    except (TypeError, ValueError):
        return str(value or "")
