"""Options of the backbone."""

from __future__ import annotations

import attrs
from attrs import validators as v

from underpaint import ConfigError

__all__ = ["SiTConfig"]


@attrs.frozen(kw_only=True)
class SiTConfig:
    """Options of ``sit/*``; the name presets the first four.

    Attributes:
        depth: Blocks.
        width: Channels of the hidden states, a multiple of 4 and of `heads`.
        heads: Attention heads.
        patch: Latent cells of one token, per side.
        mlp_ratio: Hidden width of a block's MLP as a multiple of `width`.
        qk_norm: Normalise queries and keys per head (RMS, learned scale). SiT has it off; long bf16 trainings
            diverge without it (AlignTok's authors saw it after 180 k steps).
        recompute: Recompute the activations of each block in the backward pass: less memory, a third more work.
    """

    depth: int = attrs.field(validator=v.gt(0))
    width: int = attrs.field(validator=v.gt(0))
    heads: int = attrs.field(validator=v.gt(0))
    patch: int = attrs.field(validator=v.gt(0))
    mlp_ratio: float = attrs.field(default=4.0, validator=v.gt(0))
    qk_norm: bool = False
    recompute: bool = False

    def __attrs_post_init__(self) -> None:
        if self.width % 4 or self.width % self.heads:
            raise ConfigError(
                f"A SiT of width {self.width} with {self.heads} heads cannot be made; "
                "the width must be a multiple of 4 (for its positions) and of the heads."
            )
