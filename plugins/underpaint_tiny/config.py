"""Options of the small vision transformer."""

from __future__ import annotations

import attrs
from attrs import validators as v

from underpaint import ConfigError

__all__ = ["TinyViTConfig"]


@attrs.frozen(kw_only=True)
class TinyViTConfig:
    """Options of `TinyViT`.

    Attributes:
        width: Channels of a token, a multiple of 4 and of `heads`.
        depth: Number of blocks.
        heads: Attention heads.
        patch: Pixels of a patch, per side, which is also the stride.
        layers: Blocks whose outputs become the maps, in any order; negative counts from the last.
    """

    width: int = attrs.field(default=192, validator=v.gt(0))
    depth: int = attrs.field(default=6, validator=v.gt(0))
    heads: int = attrs.field(default=3, validator=v.gt(0))
    patch: int = attrs.field(default=8, validator=v.gt(0))
    layers: tuple[int, ...] = (-1,)

    def __attrs_post_init__(self) -> None:
        if self.width % self.heads or self.width % 4:
            raise ConfigError(f"width is {self.width}; it must be a multiple of 4 and of heads, which is {self.heads}.")
        wrong = [index for index in self.layers if not -self.depth <= index < self.depth]
        if wrong:
            raise ConfigError(
                f"layers has {wrong[0]}, but depth is {self.depth}; use 0 to {self.depth - 1}, or -1 for the last."
            )
        if not self.layers or len(set(self.blocks)) < len(self.layers):
            raise ConfigError(f"layers is {list(self.layers)}; name at least one block, and none twice.")

    @property
    def blocks(self) -> tuple[int, ...]:
        """The layers as block indices from 0, ascending."""
        return tuple(sorted(index % self.depth for index in self.layers))
