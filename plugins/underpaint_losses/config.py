"""Options of the losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from attrs import validators as v

__all__ = ["FeaturesConfig", "LpipsConfig", "VelocityConfig"]


@attrs.frozen(kw_only=True)
class VelocityConfig:
    """Options of ``velocity``.

    Attributes:
        cosine: Factor of the term ``velocity_cosine``, 1 − cosine similarity over channels; 0 leaves it out.
            LightningDiT uses 1.
    """

    cosine: float = attrs.field(default=0.0, validator=v.ge(0))


@attrs.frozen(kw_only=True)
class FeaturesConfig:
    """Options of ``features``.

    Attributes:
        encoder: Registered name of the encoder, with its weights.
        layers: Layers whose maps are compared, handed to the encoder as its option of that name; None leaves the
            encoder its own choice.
        options: Further options of the encoder.
    """

    encoder: str
    layers: tuple[int, ...] | None = attrs.field(default=None, validator=v.optional(v.min_len(1)))
    options: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class LpipsConfig:
    """Options of ``lpips``.

    Attributes:
        weights: File (path or URL; ``.safetensors``, ``.pth``) with torchvision's VGG-16 under its own keys, such as
            ``features.0.weight``, and with the linear heads under ``lin0.model.1.weight`` … ``lin4.model.1.weight``,
            if they are not in a file of their own; ``random`` takes random weights, for tests.
        heads: File with the linear heads alone.
    """

    weights: str | None = None
    heads: str | None = None
