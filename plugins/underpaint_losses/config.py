"""Options of the losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from attrs import validators as v

from underpaint import ConfigError

__all__ = ["FeaturesConfig", "LpipsConfig", "VelocityConfig", "VfConfig"]


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
        encoder: Registered name of the encoder, with its weights; the default needs no files.
        layers: Layers whose maps are compared, handed to the encoder as its option of that name; None leaves the
            encoder its own choice.
        options: Further options of the encoder.
    """

    encoder: str = "tiny/vit"
    layers: tuple[int, ...] | None = attrs.field(default=None, validator=v.optional(v.min_len(1)))
    options: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class LpipsConfig:
    """Options of ``lpips``.

    Attributes:
        weights: File (path or URL; ``.safetensors``, ``.pth``) with torchvision's VGG-16 under its own keys, such as
            ``features.0.weight``; None takes the one in torch's hub folder; ``random`` takes random weights, for tests.
        heads: File with the linear heads under ``lin0.model.1.weight`` … ``lin4.model.1.weight``; None takes those in
            the file of `weights`, or else the published ones, which come with torchmetrics.
        download: Let torchvision fetch its VGG-16 into the hub folder when it is not there.
    """

    weights: str | None = None
    heads: str | None = None
    download: bool = False

    def __attrs_post_init__(self) -> None:
        if self.weights is not None and self.download:
            raise ConfigError("lpips has 'weights' beside 'download: true'; keep one of the two.")


@attrs.frozen(kw_only=True)
class VfConfig:
    """Options of ``vf``. Margins of 0 are VFM-VAE's; VA-VAE's are 0.25 for distances and 0.5 for cosines.

    Attributes:
        encoder: Registered name of the frozen encoder whose deepest map is aligned with, with its weights; None takes
            the tokenizer's own encoder.
        options: Options of that encoder.
        distance_margin: Difference of two cosines that costs nothing.
        cosine_margin: Distance from a cosine of 1 that costs nothing.
        distance_weight: Factor of the term ``vf_distance``; 0 leaves it out.
        cosine_weight: Factor of the term ``vf_cosine``; 0 leaves it out.
    """

    encoder: str | None = None
    options: Mapping[str, Any] = attrs.field(factory=dict)
    distance_margin: float = attrs.field(default=0.0, validator=v.ge(0.0))
    cosine_margin: float = attrs.field(default=0.0, validator=v.ge(0.0))
    distance_weight: float = attrs.field(default=1.0, validator=v.ge(0.0))
    cosine_weight: float = attrs.field(default=1.0, validator=v.ge(0.0))

    def __attrs_post_init__(self) -> None:
        if not (self.distance_weight or self.cosine_weight):
            raise ConfigError("distance_weight and cosine_weight are both 0; leave one above 0, or the loss out.")
        if self.options and self.encoder is None:
            raise ConfigError("options are those of an encoder, and encoder is null; name one, or remove the options.")
