"""Options of the decoder."""

from __future__ import annotations

from typing import Any

import attrs
from attrs import validators as v

from underpaint import ConfigError

__all__ = ["DecoderConfig", "groups"]


def groups(channels: int) -> int:
    """Return the groups of a GroupNorm: 32 as published, fewer below 128 channels so that four share a group.

    A group of one channel would erase that channel's mean, and a narrow decoder would lose the colours with it.
    """
    return min(32, max(1, channels // 4))


@attrs.frozen(kw_only=True)
class DecoderConfig:
    """Options of ``ldm/decoder``. The defaults at stride 16 are VA-VAE's decoder.

    Attributes:
        base: Channels at full resolution, for a multiplier of 1.
        multipliers: Channels of each level as multiples of `base`, from full resolution to the latent's; one level
            more than there are doublings. None takes 1-1-2-2-4 at stride 16, 1-2-4-4 at stride 8, 1-2-4 at stride 4.
        blocks: Residual blocks of each level.
        attention: Self-attention after each block of the deepest level, besides the one between the middle blocks.
            Stable Diffusion's f8 decoder has it off.
    """

    base: int = attrs.field(default=128, validator=v.gt(0))
    multipliers: tuple[int, ...] | None = attrs.field(default=None)
    blocks: int = attrs.field(default=3, validator=v.gt(0))
    attention: bool = True

    @multipliers.validator
    def _divisible(self, _: Any, value: tuple[int, ...] | None) -> None:
        if value is not None and (not value or min(value) < 1):
            raise ConfigError(f"multipliers is {list(value)}; give at least one, all 1 or more.")
        for multiplier in value or (1, 2, 4):
            channels = self.base * multiplier
            if channels % groups(channels):
                raise ConfigError(
                    f"A level of base {self.base} × {multiplier} = {channels} channels does not divide into "
                    f"{groups(channels)} normalisation groups; make the product a multiple of 32, or of 4 below 128."
                )
