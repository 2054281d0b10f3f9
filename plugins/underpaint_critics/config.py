"""Options of the adversarial losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs
from attrs import validators as v

__all__ = ["DINO", "MultiScaleConfig", "Objective", "PatchGanConfig", "ProjectedConfig"]

DINO: Mapping[str, Any] = {
    "encoder": "timm/vit_small_patch16_224@dino",
    "layers": (2, 5, 8, 11),
    "options": {"norm": "none", "embedding": True},
    "summary": "layer",
}
"""The encoder of VFM-VAE's critic: four maps after the tokens before the first block."""

Objective = Literal["hinge", "least-squares", "non-saturating"]

_OBJECTIVES = v.in_(("hinge", "least-squares", "non-saturating"))
_SHARE = v.and_(v.ge(0.0), v.lt(1.0))


@attrs.frozen(kw_only=True)
class PatchGanConfig:
    """Options of ``critics/patchgan``.

    Attributes:
        objective: ``hinge`` (Lim and Ye 2017), ``least-squares`` (Mao et al. 2017) or ``non-saturating`` (Goodfellow et
            al. 2014; the logistic loss, written with softplus).
        r1: γ of the gradient penalty γ/2·‖∇D(x)‖² on real images (Mescheder et al. 2018); 0 leaves it out.
        r1_interval: Optimizer steps from one penalty to the next, each multiplied by this number (StyleGAN2).
        channels: Channels of the first layer; they double up to eight times as many.
        layers: Convolutions of stride 2.
        norm: ``batch`` normalises over the micro-batch of a rank, with its own statistics always; ``local`` over
            groups of at most eight consecutive samples, whatever the batch.
    """

    objective: Objective = attrs.field(default="hinge", validator=_OBJECTIVES)
    r1: float = attrs.field(default=0.0, validator=v.ge(0.0))
    r1_interval: int = attrs.field(default=16, validator=v.gt(0))
    channels: int = attrs.field(default=64, validator=v.gt(0))
    layers: int = attrs.field(default=3, validator=v.gt(0))
    norm: Literal["batch", "local"] = "batch"


@attrs.frozen(kw_only=True)
class MultiScaleConfig:
    """Options of ``critics/multiscale``.

    Attributes:
        objective: ``hinge``, ``least-squares`` or ``non-saturating``, as for ``critics/patchgan``.
        r1: γ of the gradient penalty on real images; 0 leaves it out.
        r1_interval: Optimizer steps from one penalty to the next, each multiplied by this number.
        channels: Channels of the first layer of each critic; they double up to eight times as many.
        layers: Convolutions of stride 2 in each critic.
        scales: Critics, each on images of half the size of the one before.
        virtual_batch: Samples that are normalised together, at most.
        feature_weight: Factor of the term ``feature_matching``; 0 leaves it out.
    """

    objective: Objective = attrs.field(default="least-squares", validator=_OBJECTIVES)
    r1: float = attrs.field(default=0.0, validator=v.ge(0.0))
    r1_interval: int = attrs.field(default=16, validator=v.gt(0))
    channels: int = attrs.field(default=64, validator=v.gt(0))
    layers: int = attrs.field(default=3, validator=v.gt(0))
    scales: int = attrs.field(default=3, validator=v.gt(0))
    virtual_batch: int = attrs.field(default=8, validator=v.gt(0))
    feature_weight: float = attrs.field(default=10.0, validator=v.ge(0.0))


@attrs.frozen(kw_only=True)
class ProjectedConfig:
    """Options of ``critics/projected``; the defaults are VFM-VAE's but for its `encoder`.

    Attributes:
        objective: ``hinge``, ``least-squares`` or ``non-saturating``, as for ``critics/patchgan``.
        r1: γ of the gradient penalty on real images; 0 leaves it out.
        r1_interval: Optimizer steps from one penalty to the next, each multiplied by this number.
        encoder: Registered name of the frozen encoder, with its weights. None is DINO's ViT-S/16 as in
            ``critics/vfm-vae``, and ``tiny/vit``, with a warning, where DINO's weights are not on the machine and
            cannot be fetched; what is chosen has its own `layers`, `options` and `summary`.
        layers: Layers whose maps are judged, one head each, handed to the encoder as its option of that name; None
            leaves the encoder its own choice.
        options: Further options of the encoder.
        second_last_head: Whether a second head judges the deepest map, as in RAE.
        summary: What is added to every cell of a map: the class token of its ``layer``; the encoder's ``pooled``
            summary of the image, the same for all maps; or ``none``, the default for an encoder that is named.
        size: Side of the square images that the encoder sees, in pixels; None is the size it was trained at.
        crop: Share of batches of larger images that are cropped to `size` at a random place, not resized.
        virtual_batch: Samples that the heads normalise together, at most.
        color: Whether brightness, saturation and contrast are drawn for each image (DiffAugment).
        translation: Largest shift of an image, as a share of its side; 0 for none.
        cutout: Side of the square that is blanked, as a share of the image's; 0 for none.
        quantise: Whether the critic learns on reconstructions rounded to 8 bit, as real images are.
    """

    objective: Objective = attrs.field(default="hinge", validator=_OBJECTIVES)
    r1: float = attrs.field(default=0.0, validator=v.ge(0.0))
    r1_interval: int = attrs.field(default=16, validator=v.gt(0))
    encoder: str | None = None
    layers: tuple[int, ...] | None = None
    options: Mapping[str, Any] = attrs.field(factory=dict)
    second_last_head: bool = False
    summary: Literal["layer", "pooled", "none"] | None = attrs.field(
        default=None, validator=v.optional(v.in_(("layer", "pooled", "none")))
    )
    size: int | None = attrs.field(default=None, validator=v.optional(v.gt(0)))
    crop: float = attrs.field(default=0.5, validator=v.and_(v.ge(0.0), v.le(1.0)))
    virtual_batch: int = attrs.field(default=8, validator=v.gt(0))
    color: bool = True
    translation: float = attrs.field(default=0.125, validator=_SHARE)
    cutout: float = attrs.field(default=0.2, validator=_SHARE)
    quantise: bool = False
