"""Procedural scenes as a data set."""

from __future__ import annotations

import hashlib
from typing import Any

import attrs

from underpaint import Dataset, Sample
from underpaint_scenes.config import ShapesConfig
from underpaint_scenes.render import render
from underpaint_scenes.scene import caption, draw
from underpaint_scenes.shapes import SHAPES

__all__ = ["Shapes"]

VERSION = 1
"""Changes whenever the same seed and index give other pixels."""


class Shapes(Dataset):
    """Scenes of one to four lit shapes on a textured ground; the class is the shape of the largest.

    A sample is a pure function of seed and index, whatever the length.
    """

    has_text = True

    def __init__(self, config: ShapesConfig) -> None:
        self._config = config
        self.classes = tuple(SHAPES)

    def __len__(self) -> int:
        return self._config.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} scenes; {index} is not one of them.")
        scene = draw(self._config.seed, index)
        return Sample(
            image=render(scene, self._config.size),
            key=f"scene-{index:08d}",
            label=self.classes.index(scene.main.shape),
            text=caption(scene),
        )

    def factors(self, index: int) -> dict[str, Any]:
        """Return what a scene was drawn from, as plain values; see `Scene` for the fields."""
        return attrs.asdict(draw(self._config.seed, index))

    def fingerprint(self) -> str:
        """Hash the options and the version of the drawing."""
        return hashlib.sha256(repr((VERSION, self._config)).encode()).hexdigest()
