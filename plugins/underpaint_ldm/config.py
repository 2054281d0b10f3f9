"""Options of the encoder, the adapter, the decoder and the importers."""

from __future__ import annotations

import attrs
from attrs import validators as v

from underpaint import ConfigError

__all__ = [
    "DecoderConfig",
    "EncoderConfig",
    "FluxVaeConfig",
    "GaussianConfig",
    "LdmConfig",
    "VaVaeConfig",
    "groups_of",
]


def groups_of(channels: int, groups: int | None) -> int:
    """Return the groups of a GroupNorm: `groups`, or 32 as published, fewer below 128 channels so that four share one.

    A group of one channel would erase that channel's mean, and a narrow decoder would lose the colours with it.
    """
    return min(32, max(1, channels // 4)) if groups is None else groups


def _check(base: int, multipliers: tuple[int, ...], groups: int | None) -> None:
    if not multipliers or min(multipliers) < 1:
        raise ConfigError(f"multipliers is {list(multipliers)}; give at least one, all 1 or more.")
    for multiplier in multipliers:
        channels = base * multiplier
        if channels % groups_of(channels, groups):
            raise ConfigError(
                f"A level of base {base} × {multiplier} = {channels} channels does not divide into "
                f"{groups_of(channels, groups)} normalisation groups; make the product a multiple of "
                f"{'32, or of 4 below 128' if groups is None else groups}."
            )


@attrs.frozen(kw_only=True)
class EncoderConfig:
    """Options of ``ldm/encoder``. The defaults are VA-VAE's encoder, of stride 16.

    Attributes:
        base: Channels at full resolution, for a multiplier of 1.
        multipliers: Channels of each level as multiples of `base`, from full resolution to the latent's. There is a
            halving between levels: five levels have stride 16, four stride 8. Stable Diffusion's are 1-2-4-4.
        blocks: Residual blocks of each level.
        attention: Self-attention after each block of the deepest level, besides the one between the middle blocks.
            Stable Diffusion's f8 encoder has it off.
        groups: Groups of each normalisation; None takes 32, fewer below 128 channels. Imported weights have their own.
    """

    base: int = attrs.field(default=128, validator=v.gt(0))
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = attrs.field(default=2, validator=v.gt(0))
    attention: bool = True
    groups: int | None = attrs.field(default=None, validator=v.optional(v.gt(0)))

    def __attrs_post_init__(self) -> None:
        _check(self.base, self.multipliers, self.groups)
        # The first block normalises what the first convolution gives, whatever its own multiplier.
        _check(self.base, (1,), self.groups)


@attrs.frozen(kw_only=True)
class GaussianConfig:
    """Options of ``ldm/gaussian``.

    Attributes:
        quant_conv: A 1×1 convolution of mean and log-variance after the 3×3 one. FLUX and Stable Diffusion 3 have none.
    """

    quant_conv: bool = True


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
        post_quant_conv: A 1×1 convolution of the latent before all else. FLUX and Stable Diffusion 3 have none.
        groups: Groups of each normalisation; None takes 32, fewer below 128 channels. Imported weights have their own.
    """

    base: int = attrs.field(default=128, validator=v.gt(0))
    multipliers: tuple[int, ...] | None = None
    blocks: int = attrs.field(default=3, validator=v.gt(0))
    attention: bool = True
    post_quant_conv: bool = True
    groups: int | None = attrs.field(default=None, validator=v.optional(v.gt(0)))

    def __attrs_post_init__(self) -> None:
        _check(self.base, (1, 2, 4) if self.multipliers is None else self.multipliers, self.groups)


@attrs.frozen(kw_only=True)
class LdmConfig:
    """Options of the importer ``ldm``.

    Attributes:
        scale: Factor that latents are multiplied with before diffusion, such as 0.13025 for Stable Diffusion XL. None
            takes the file's own ``scale_factor``; without one, Stable Diffusion's 0.18215 for four channels at
            stride 8 with a ``quant_conv``, and else the latents stay without statistics.
        shift: What is subtracted from the latents before that; goes with `scale`.
    """

    scale: float | None = attrs.field(default=None, validator=v.optional(v.gt(0)))
    shift: float | None = None

    def __attrs_post_init__(self) -> None:
        if self.shift is not None and self.scale is None:
            raise ConfigError(f"shift is {self.shift} without a scale; set scale too, to 1 if there is none.")


@attrs.frozen(kw_only=True)
class FluxVaeConfig:
    """Options of the importer ``flux-vae``. The defaults are FLUX.1's.

    Attributes:
        scale: Factor that shifted latents are multiplied with before diffusion.
        shift: What is subtracted from the latents before that.
    """

    scale: float = attrs.field(default=0.3611, validator=v.gt(0))
    shift: float = 0.1159


@attrs.frozen(kw_only=True)
class VaVaeConfig:
    """Options of the importer ``va-vae``.

    Attributes:
        statistics: File with the latents' ``mean`` and ``std`` per channel, as LightningDiT publishes it beside the
            weights (``latents_stats.pt``); None leaves the latents without statistics.
    """

    statistics: str | None = None
