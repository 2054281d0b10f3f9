"""The report as Markdown, for places that show no HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from underpaint.report.facts import RunFacts
from underpaint.report.words import MFU_CONVENTION, figure, protocol_lines, speed_cells, summary

__all__ = ["bullets", "markdown", "table"]


def markdown(facts: RunFacts, pictures: Mapping[str, str]) -> str:
    """Write the report.

    Args:
        facts: What to show.
        pictures: Relative path of every picture file by its caption.
    """
    parts = [f"# {facts.name}", *_about(facts), bullets([*summary(facts), *facts.missing])]
    if facts.numbers:
        rows = [
            (
                n.name,
                figure(n.value, n.std),
                "; ".join(f"{key}: {text}" for key, text in protocol_lines(n.protocol)),
                n.id,
            )
            for n in facts.numbers
        ]
        parts += ["## Numbers", table(("Number", "Value", "Measured how", "Protocol"), rows)]
    if pictures:
        parts += ["## Pictures", *(f"{caption}\n\n![{caption}]({path})" for caption, path in pictures.items())]
    if facts.stages:
        speeds = [(stage.name, *speed_cells(stage.speed)) for stage in facts.stages]
        header = ("Stage", "img/s", "MFU", "Data wait", "Memory", "Time")
        parts += ["## Speed", table(header, speeds), MFU_CONVENTION]
    if facts.config_text:
        parts += ["## Recipe", f"````yaml\n{facts.config_text.rstrip()}\n````"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(facts: RunFacts) -> list[str]:
    about = facts.config.get("about")
    return [str(about)] if about else []


def bullets(sentences: Sequence[str]) -> str:
    """Return sentences as a list."""
    return "\n".join(f"- {_flat(sentence)}" for sentence in sentences)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_flat(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _flat(text: str) -> str:
    return " ".join(text.split())
