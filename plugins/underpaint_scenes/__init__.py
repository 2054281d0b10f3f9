"""Procedural scenes: images, labels and captions without any download."""

from __future__ import annotations

from typing import Any

from underpaint import hookimpl


@hookimpl
def register_datasets(register: Any) -> None:
    """Register the procedural scenes."""
    register(
        "scenes/shapes",
        "underpaint_scenes.dataset:Shapes",
        config="underpaint_scenes.config:ShapesConfig",
        tiny={"length": 12, "size": 32},
        summary="procedural scenes of lit shapes on textured grounds, with classes and captions",
    )
