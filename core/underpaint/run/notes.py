"""Plain sentences that say what was trained on what, for the top of the report."""

from __future__ import annotations

import json

from underpaint.config.recipe import write_atomically
from underpaint.config.schema import Recipe
from underpaint.run.data import RunData
from underpaint.run.folder import RunFolder

__all__ = ["notes", "write_notes"]


def notes(recipe: Recipe, data: RunData) -> list[str]:
    """Return the sentences; what a number must not be mistaken for is said here."""
    facts = data.facts()
    train, validation = facts["train"], facts["validation"]
    assert isinstance(train, dict)
    assert isinstance(validation, dict)
    size = f"{data.config.height}×{data.config.width} px"
    count = min(recipe.evaluation.images, validation["samples"])
    measured = f"{count:,} others of {validation['name']}"
    lines = [f"Trained on {train['samples']:,} images of {train['name']} at {size}, measured on {measured}."]
    if train["name"].startswith("scenes/"):
        lines.append(
            "These images are rendered by a program, not photographs: the numbers say nothing about photographs."
        )
    encoder = recipe.tokenizer.encoder
    if encoder is not None:
        name = encoder.name
        if name == "tiny/vit":
            lines.append(
                "The encoder tiny/vit is small and was trained without labels on 80,000 photographs of 64 px: its "
                "latents mean something, and far less than those of dinov2-b, which gives what the papers measure."
            )
        elif name.endswith("@random"):
            lines.append(
                f"The encoder {name} starts from random weights, so its latents carry no pretrained semantics; "
                "a pretrained encoder such as dinov2-b gives what the papers measure."
            )
    return lines


def write_notes(folder: RunFolder, recipe: Recipe, data: RunData) -> None:
    """Write ``report/notes.json``."""
    folder.report.mkdir(exist_ok=True)
    text = json.dumps(notes(recipe, data), indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder.report / "notes.json", text)
