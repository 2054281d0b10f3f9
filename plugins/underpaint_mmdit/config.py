"""Options of the backbones."""

from __future__ import annotations

from typing import Literal

import attrs
from attrs import validators as v

from underpaint import ConfigError

__all__ = ["FluxConfig", "MMDiTConfig"]


def _check_heads(name: str, width: int, heads: int) -> None:
    if width % heads:
        raise ConfigError(
            f"{name} of width {width} cannot be split into {heads} heads; give a width that is a multiple of the heads."
        )


@attrs.frozen(kw_only=True)
class MMDiTConfig:
    """Options of ``mmdit/*``; the name presets all but `mlp_ratio` and `recompute`.

    Attributes:
        depth: Joint blocks.
        width: Channels of the hidden states, a multiple of 4 and of `heads`. Stable Diffusion 3 has 64·depth.
        heads: Attention heads.
        patch: Latent cells of one token, per side.
        mlp_ratio: Hidden width of a block's MLP as a multiple of `width`.
        qk_norm: Normalisation of queries and keys per head, with learned scale: ``none`` (SD3-medium), ``rms``
            (SD3.5, keeps long bf16 trainings stable), ``ln``.
        table: Rows and columns of the table of positions, in tokens; a latent takes its middle. Larger latents are
            refused.
        dual: First blocks in which the image tokens also attend to themselves alone (SD3.5-medium has 13).
        recompute: Recompute the activations of each block in the backward pass: less memory, a third more work.
    """

    depth: int = attrs.field(validator=v.gt(0))
    width: int = attrs.field(validator=v.gt(0))
    heads: int = attrs.field(validator=v.gt(0))
    patch: int = attrs.field(validator=v.gt(0))
    mlp_ratio: float = attrs.field(default=4.0, validator=v.gt(0))
    qk_norm: Literal["none", "ln", "rms"] = attrs.field(default="rms", validator=v.in_(("none", "ln", "rms")))
    table: int = attrs.field(default=64, validator=v.gt(0))
    dual: int = attrs.field(default=0, validator=v.ge(0))
    recompute: bool = False

    def __attrs_post_init__(self) -> None:
        _check_heads("An MMDiT", self.width, self.heads)
        if self.width % 4:
            raise ConfigError(
                f"An MMDiT of width {self.width} cannot be made; its positions need a width that is a multiple of 4."
            )
        if self.dual > self.depth:
            raise ConfigError(
                f"dual is {self.dual}, and the MMDiT has {self.depth} blocks; give a number of blocks up to that."
            )


@attrs.frozen(kw_only=True)
class FluxConfig:
    """Options of ``flux/*``; the name presets all but `mlp_ratio` and `recompute`.

    Attributes:
        double: Blocks with separate weights for text and image.
        single: Blocks after them, with the same weights for both.
        width: Channels of the hidden states.
        heads: Attention heads.
        patch: Latent cells of one token, per side.
        axes: Channels of a head that turn with the index of the image, its row and its column: three even numbers
            whose sum is width/heads. There is one image, so the first ones stand still, as in the published models.
        guidance: Strength that a guidance-distilled model is told (FLUX.1-dev: 2.5 to 4); None builds a model without
            that input.
        mlp_ratio: Hidden width of a block's MLP as a multiple of `width`.
        recompute: Recompute the activations of each block in the backward pass: less memory, a third more work.
    """

    double: int = attrs.field(validator=v.ge(0))
    single: int = attrs.field(validator=v.gt(0))
    width: int = attrs.field(validator=v.gt(0))
    heads: int = attrs.field(validator=v.gt(0))
    patch: int = attrs.field(validator=v.gt(0))
    axes: tuple[int, int, int]
    guidance: float | None = attrs.field(default=None, validator=v.optional(v.ge(0)))
    mlp_ratio: float = attrs.field(default=4.0, validator=v.gt(0))
    recompute: bool = False

    def __attrs_post_init__(self) -> None:
        _check_heads("A FLUX", self.width, self.heads)
        head = self.width // self.heads
        if sum(self.axes) != head or any(axis % 2 or axis < 0 for axis in self.axes):
            raise ConfigError(
                f"axes is {list(self.axes)} for heads of {head} channels; give three even numbers that sum to {head}."
            )
