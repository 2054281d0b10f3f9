"""Options of the timm encoders."""

from __future__ import annotations

from typing import Any, Literal

import attrs
from attrs import validators as v

from underpaint import ConfigError

__all__ = ["TimmConfig"]


@attrs.frozen(kw_only=True)
class TimmConfig:
    """Options of `TimmEncoder`.

    Attributes:
        layers: Blocks whose outputs become the maps, in any order; negative counts from the last.
        embedding: Also give the tokens before the first block, positions added, as the first map, not normalised.
        norm: The model's final norm, on every map: ``affine`` as trained, ``plain`` without scale and bias (as
            RAE does), ``none`` leaves the blocks' raw outputs; ``last`` is ``affine`` on the last block and leaves the
            others, as VFM-VAE does. DINOv2's and timm's own functions for intermediate layers also put the final norm
            on each of them.
        stride: Pixels of the given image per cell; images are resized so that one patch covers it. None is
            the patch size, but 16 for patch 14: then 256 px gives 16×16 cells as the patch-16 models do.
        interpolation: How images are resized; None is timm's entry for the weights.
        antialias: Whether the resize to the model's input filters what the smaller image cannot show. RAE's does not
            (rae.md §2.1), and its decoders expect the features of such images.
        tag: timm's weight tag whose mean, std and native size hold for ``@file:`` and ``@random``. Needed for
            a file only where timm's tags of the model differ in mean or std.
    """

    layers: tuple[int, ...] = attrs.field(default=(-1,))
    embedding: bool = False
    norm: Literal["affine", "plain", "none", "last"] = attrs.field(
        default="affine", validator=v.in_(("affine", "plain", "none", "last"))
    )
    stride: int | None = attrs.field(default=None, validator=v.optional(v.gt(0)))
    interpolation: Literal["bilinear", "bicubic"] | None = None
    antialias: bool = True
    tag: str | None = None

    @layers.validator
    def _some(self, _: Any, value: tuple[int, ...]) -> None:
        if not value:
            raise ConfigError("layers is empty; name at least one block, such as [-1] for the last.")
