"""Procedural scenes: images, labels and captions without any download."""

from __future__ import annotations

from typing import TYPE_CHECKING

from underpaint import hookimpl

if TYPE_CHECKING:
    from underpaint.registry.registrar import Registrar


@hookimpl
def register_datasets(register: Registrar) -> None:
    register(
        "scenes/shapes",
        "underpaint_scenes.dataset:Shapes",
        config="underpaint_scenes.config:ShapesConfig",
        tiny={"length": 12, "size": 32},
        summary="procedural scenes of lit shapes on textured grounds, with classes and captions",
    )
