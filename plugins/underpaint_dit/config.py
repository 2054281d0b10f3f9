"""Options of the backbone."""

from __future__ import annotations

import attrs
from attrs import validators as v

__all__ = ["DiTConfig"]


@attrs.frozen(kw_only=True)
class DiTConfig:
    """Options of ``dit/*``; the name presets the first four.

    Attributes:
        depth: Blocks.
        width: Channels of the hidden states, a multiple of 4 and of `heads`.
        heads: Attention heads.
        patch: Latent cells of one token, per side.
        mlp_ratio: Hidden width of a block's MLP as a multiple of `width`.
        recompute: Recompute the activations of each block in the backward pass: less memory, a third more work.
    """

    depth: int = attrs.field(validator=v.gt(0))
    width: int = attrs.field(validator=v.gt(0))
    heads: int = attrs.field(validator=v.gt(0))
    patch: int = attrs.field(validator=v.gt(0))
    mlp_ratio: float = attrs.field(default=4.0, validator=v.gt(0))
    recompute: bool = False
