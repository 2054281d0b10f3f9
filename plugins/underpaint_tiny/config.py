"""Options of the small vision transformer and of the losses that train it."""

from __future__ import annotations

import attrs
from attrs import validators as v

from underpaint import ConfigError

__all__ = ["ContrastConfig", "SupervisedConfig", "TinyViTConfig"]


@attrs.frozen(kw_only=True)
class TinyViTConfig:
    """Options of `TinyViT`.

    Attributes:
        width: Channels of a token, a multiple of 4 and of `heads`, and of `patch` / 2.
        depth: Number of blocks.
        heads: Attention heads.
        patch: Pixels of a patch, per side, which is also the stride; a power of 2.
        layers: Blocks whose outputs become the maps, in any order; negative counts from the last. Blocks after the
            deepest of them are not built.
    """

    width: int = attrs.field(default=256, validator=v.gt(0))
    depth: int = attrs.field(default=6, validator=v.gt(0))
    heads: int = attrs.field(default=4, validator=v.gt(0))
    patch: int = attrs.field(default=8, validator=v.ge(2))
    layers: tuple[int, ...] = (-1,)

    def __attrs_post_init__(self) -> None:
        if self.patch & (self.patch - 1):
            raise ConfigError(f"patch is {self.patch}; it must be a power of 2, such as 8.")
        if self.width % self.heads or self.width % 4 or self.width % (self.patch // 2):
            raise ConfigError(
                f"width is {self.width}; it must be a multiple of 4, of half the patch, which is {self.patch}, and of "
                f"heads, which is {self.heads}."
            )
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


def _range(instance: object, attribute: attrs.Attribute[tuple[float, float]], value: tuple[float, float]) -> None:
    if not 0.0 < value[0] <= value[1] <= 1.0:
        raise ConfigError(f"{attribute.name} is {list(value)}; it must be [low, high] with 0 < low ≤ high ≤ 1.")


@attrs.frozen(kw_only=True)
class ContrastConfig:
    """Options of ``tiny/contrast``.

    Attributes:
        wide: Views of the whole size of the image.
        narrow: Views of half its size.
        wide_area: Share of the image that a wide view shows.
        narrow_area: Share that a narrow view shows.
        hidden: Width of the projector.
        channels: Channels of the projection.
        temperature: Of the cross-entropy.
        pixels: Factor of the term ``pixels``, by which pixels are read from the features; 0 leaves it out.
    """

    wide: int = attrs.field(default=2, validator=v.ge(2))
    narrow: int = attrs.field(default=4, validator=v.ge(0))
    wide_area: tuple[float, float] = attrs.field(default=(0.3, 1.0), validator=_range)
    narrow_area: tuple[float, float] = attrs.field(default=(0.08, 0.3), validator=_range)
    hidden: int = attrs.field(default=1024, validator=v.gt(0))
    channels: int = attrs.field(default=128, validator=v.gt(0))
    temperature: float = attrs.field(default=0.15, validator=v.gt(0))
    pixels: float = attrs.field(default=0.1, validator=v.ge(0))


@attrs.frozen(kw_only=True)
class SupervisedConfig:
    """Options of ``tiny/supervised``.

    Attributes:
        classes: Classes of the data set.
        area: Share of the image that a view shows.
        smoothing: Label smoothing.
    """

    classes: int = attrs.field(default=200, validator=v.gt(1))
    area: tuple[float, float] = attrs.field(default=(0.3, 1.0), validator=_range)
    smoothing: float = attrs.field(default=0.1, validator=v.and_(v.ge(0.0), v.lt(1.0)))
