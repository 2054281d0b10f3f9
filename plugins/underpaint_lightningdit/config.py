"""Options of the backbones."""

from __future__ import annotations

import attrs
from attrs import validators as v

from underpaint import ConfigError

__all__ = ["DiTDHConfig", "LightningDiTConfig"]


@attrs.frozen(kw_only=True)
class LightningDiTConfig:
    """Options of ``lightningdit/*``; the name presets the first four.

    Attributes:
        depth: Blocks.
        width: Channels of the hidden states, a multiple of four times `heads`.
        heads: Attention heads.
        patch: Latent cells of one token, per side.
        mlp_ratio: A block's SwiGLU has two thirds of this times `width` hidden channels, as many weights as an MLP of
            this ratio.
        qk_norm: Normalise queries and keys per head (RMS, learned scale). The published files have it off, and long
            bf16 trainings diverge without it (VA-VAE after about 140 k steps, AlignTok after 180 k).
        shift: Whether the condition shifts the normalised tokens, besides scaling and gating them.
        recompute: Recompute the activations of each block in the backward pass: less memory, a third more work.
    """

    depth: int = attrs.field(validator=v.gt(0))
    width: int = attrs.field(validator=v.gt(0))
    heads: int = attrs.field(validator=v.gt(0))
    patch: int = attrs.field(validator=v.gt(0))
    mlp_ratio: float = attrs.field(default=4.0, validator=v.gt(0))
    qk_norm: bool = True
    shift: bool = True
    recompute: bool = False

    def __attrs_post_init__(self) -> None:
        _check_heads("LightningDiT", self.width, self.heads)


@attrs.frozen(kw_only=True)
class DiTDHConfig:
    """Options of ``ditdh/*``; the name presets the first three.

    Attributes:
        depth: Blocks of the transformer that conditions the head.
        width: Channels of its hidden states, a multiple of four times `heads`.
        heads: Its attention heads.
        head_depth: Blocks of the head.
        head_width: Channels of the head, a multiple of four times `head_heads`. RAE wants it no smaller than the
            latent's channels.
        head_heads: Attention heads of the head.
        mlp_ratio: As for ``lightningdit/*``, in both parts.
        qk_norm: Normalise queries and keys per head (RMS, learned scale). RAE has it off.
        recompute: Recompute the activations of each block in the backward pass: less memory, a third more work.
    """

    depth: int = attrs.field(validator=v.gt(0))
    width: int = attrs.field(validator=v.gt(0))
    heads: int = attrs.field(validator=v.gt(0))
    head_depth: int = attrs.field(default=2, validator=v.gt(0))
    head_width: int = attrs.field(default=2048, validator=v.gt(0))
    head_heads: int = attrs.field(default=16, validator=v.gt(0))
    mlp_ratio: float = attrs.field(default=4.0, validator=v.gt(0))
    qk_norm: bool = False
    recompute: bool = False

    def __attrs_post_init__(self) -> None:
        _check_heads("DiT^DH", self.width, self.heads)
        _check_heads("DiT^DH head", self.head_width, self.head_heads)


def _check_heads(what: str, width: int, heads: int) -> None:
    if width % (4 * heads):
        raise ConfigError(
            f"A {what} of width {width} with {heads} heads cannot be made; its rotary positions want a width that is a "
            f"multiple of {4 * heads}, four channels for each head."
        )
