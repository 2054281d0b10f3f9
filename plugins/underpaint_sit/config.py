"""Options of the backbones, the alignment loss and the importers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs
from attrs import validators as v

from underpaint import ConfigError

__all__ = ["ImportConfig", "REGConfig", "RepaConfig", "SiTConfig"]


@attrs.frozen(kw_only=True)
class SiTConfig:
    """Options of ``sit/*``; the name presets the first four.

    Attributes:
        depth: Blocks.
        width: Channels of the hidden states, a multiple of 4 and of `heads`.
        heads: Attention heads.
        patch: Latent cells of one token, per side.
        mlp_ratio: Hidden width of a block's MLP as a multiple of `width`.
        qk_norm: Normalise queries and keys per head. SiT has it off; long bf16 trainings diverge without it
            (AlignTok's authors saw it after 180 k steps).
        qk_norm_type: That norm: ``rms`` has a learned scale (LightningDiT), ``layer`` a learned scale and shift (the
            option of REPA and REG).
        outputs: Maps of d channels that the head writes, one after the other in ``velocity``. Above 1 it is no
            backbone by itself but the network of another one: ``dit/*`` reads noise and variance.
        recompute: Recompute the activations of each block in the backward pass: less memory, a third more work.
    """

    depth: int = attrs.field(validator=v.gt(0))
    width: int = attrs.field(validator=v.gt(0))
    heads: int = attrs.field(validator=v.gt(0))
    patch: int = attrs.field(validator=v.gt(0))
    mlp_ratio: float = attrs.field(default=4.0, validator=v.gt(0))
    qk_norm: bool = False
    qk_norm_type: Literal["rms", "layer"] = "rms"
    outputs: int = attrs.field(default=1, validator=v.gt(0))
    recompute: bool = False

    def __attrs_post_init__(self) -> None:
        if self.width % 4 or self.width % self.heads:
            raise ConfigError(
                f"A SiT of width {self.width} with {self.heads} heads cannot be made; "
                "the width must be a multiple of 4 (for its positions) and of the heads."
            )


@attrs.frozen(kw_only=True)
class REGConfig:
    """Options of ``reg/*``; the name presets the first four.

    Attributes:
        depth: Blocks.
        width: Channels of the hidden states, a multiple of 4 and of `heads`.
        heads: Attention heads.
        patch: Latent cells of one token, per side.
        companion: Channels of the vector that is diffused beside the latent: the pooled width of the encoder it comes
            from, 768 for DINOv2-B.
        mlp_ratio: As in ``sit/*``.
        qk_norm: As in ``sit/*``.
        qk_norm_type: As in ``sit/*``. VFM-VAE trains REG with ``layer``.
        recompute: As in ``sit/*``.
    """

    depth: int = attrs.field(validator=v.gt(0))
    width: int = attrs.field(validator=v.gt(0))
    heads: int = attrs.field(validator=v.gt(0))
    patch: int = attrs.field(validator=v.gt(0))
    companion: int = attrs.field(default=768, validator=v.gt(0))
    mlp_ratio: float = attrs.field(default=4.0, validator=v.gt(0))
    qk_norm: bool = False
    qk_norm_type: Literal["rms", "layer"] = "rms"
    recompute: bool = False

    def sit(self) -> SiTConfig:
        """Return the options of the SiT around which it is built."""
        shared = attrs.asdict(self)
        del shared["companion"]
        return SiTConfig(**shared)


@attrs.frozen(kw_only=True)
class RepaConfig:
    """Options of ``repa``.

    Attributes:
        encoder: Registered name of the encoder whose features are the targets, with its weights, such as
            ``timm/vit_base_patch14_dinov2``.
        options: Options of the encoder.
        layer: Block whose hidden states are aligned, counted from 0. REPA's encoder depth 8 is layer 7.
        projector: Hidden channels of the projector ``mlp``.
        projection: ``mlp`` projects each token by three layers (REPA); ``conv`` projects the map of tokens by one
            convolution of 3×3 cells (iREPA).
        spatial: Share γ of the targets' mean over the cells that is taken off before they are divided by their
            deviation over the cells, channel by channel (iREPA's spatial normalisation); None leaves them as they are.
    """

    encoder: str
    options: Mapping[str, Any] = attrs.field(factory=dict)
    layer: int = attrs.field(default=7, validator=v.ge(0))
    projector: int = attrs.field(default=2048, validator=v.gt(0))
    projection: Literal["mlp", "conv"] = attrs.field(default="mlp", validator=v.in_(("mlp", "conv")))
    spatial: float | None = attrs.field(default=None, validator=v.optional([v.ge(0), v.le(1)]))


@attrs.frozen(kw_only=True)
class ImportConfig:
    """Options of the importers ``dit``, ``sit``, ``repa`` and ``reg``.

    Attributes:
        heads: Attention heads. A file does not tell; None takes the published number for its width.
    """

    heads: int | None = attrs.field(default=None, validator=v.optional(v.gt(0)))
