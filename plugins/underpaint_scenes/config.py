"""Options of the procedural scenes."""

from __future__ import annotations

import attrs
from attrs import validators as v

__all__ = ["ShapesConfig"]


@attrs.frozen(kw_only=True)
class ShapesConfig:
    """Scenes of lit shapes.

    Attributes:
        length: Number of scenes.
        size: Side of the square image in pixels.
        seed: Seed of all scenes; two data sets of different seeds have no scene in common.
    """

    length: int = attrs.field(default=20_000, validator=v.gt(0))
    size: int = attrs.field(default=64, validator=v.ge(16))
    seed: int = attrs.field(default=0, validator=v.ge(0))
