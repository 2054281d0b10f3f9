"""Options of the open_clip encoders."""

from __future__ import annotations

from typing import Any, Literal

import attrs
from attrs import validators as v

from underpaint import ConfigError

__all__ = ["OpenClipConfig"]


@attrs.frozen(kw_only=True)
class OpenClipConfig:
    """Options of `OpenClipEncoder`.

    Attributes:
        layers: Blocks whose outputs become the maps, in any order; negative counts from the last.
        embedding: Also give the tokens before the first block, positions added, as the first map, without final norm.
        norm: The tower's final norm, on every map: ``affine`` as trained, ``plain`` without scale and bias,
            ``none`` leaves the blocks' raw outputs; ``last`` is ``affine`` on the last block and leaves the others, as
            VFM-VAE does. The projection to the text space is never in a map.
        stride: Pixels of the given image per cell; images are resized so that one patch covers it. None is
            the patch size, but 16 for patch 14: then 256 px gives 16×16 cells as the patch-16 models do.
        tag: open_clip's weight tag whose mean, std and activation hold for ``@file:`` and ``@random``. Needed
            for a file only where the tags of the model differ in mean or std.
    """

    layers: tuple[int, ...] = attrs.field(default=(-1,))
    embedding: bool = False
    norm: Literal["affine", "plain", "none", "last"] = attrs.field(
        default="affine", validator=v.in_(("affine", "plain", "none", "last"))
    )
    stride: int | None = attrs.field(default=None, validator=v.optional(v.gt(0)))
    tag: str | None = None

    @layers.validator
    def _some(self, _: Any, value: tuple[int, ...]) -> None:
        if not value:
            raise ConfigError("layers is empty; name at least one block, such as [-1] for the last.")
