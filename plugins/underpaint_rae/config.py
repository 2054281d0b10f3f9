"""Options of the adapter, the decoders and the importer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from attrs import validators as v

from underpaint import ConfigError

__all__ = ["IdentityConfig", "ImportConfig", "ViTDecoderConfig"]

_positive: Any = v.gt(0)


@attrs.frozen(kw_only=True)
class IdentityConfig:
    """Options of ``rae/identity``.

    Attributes:
        tau: Largest standard deviation of the noise on training latents; 0 for none. (rae.md §2.2: 0.8.)
    """

    tau: float = attrs.field(default=0.8, validator=v.ge(0.0))


@attrs.frozen(kw_only=True)
class ViTDecoderConfig:
    """Options of the ViT decoders; the defaults are ViT-XL's, which RAE uses (rae.md §2.3).

    Attributes:
        width: Channels of a token, a multiple of 4 and of `heads`.
        depth: Number of blocks.
        heads: Attention heads.
        hidden: Width of the blocks' MLPs.
        mean: Per-channel mean of the colour space that the last layer speaks, for images in [0, 1]; that of the
            encoder in RAE. The default is ImageNet's, which DINOv2 and MAE use; SigLIP's is 0.5.
        std: Per-channel standard deviation of that colour space.
    """

    width: int = attrs.field(default=1152, validator=_positive)
    depth: int = attrs.field(default=28, validator=_positive)
    heads: int = attrs.field(default=16, validator=_positive)
    hidden: int = attrs.field(default=4096, validator=_positive)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = attrs.field(
        default=(0.229, 0.224, 0.225), validator=v.deep_iterable(member_validator=_positive)
    )

    def __attrs_post_init__(self) -> None:
        if self.width % self.heads or self.width % 4:
            raise ConfigError(f"width is {self.width}; it must be a multiple of 4 and of heads, which is {self.heads}.")


@attrs.frozen(kw_only=True)
class ImportConfig:
    """Options of the importer ``rae``.

    Attributes:
        encoder: Registered name of the encoder that the decoder was trained for; RAE's decoder files hold none.
        encoder_options: Options of the encoder. RAE's have a final norm without scale and bias, and a resize without
            antialiasing.
        statistics: RAE's file of latent statistics (``stat.pt``), with which its diffusion models were trained; None
            leaves them unknown.
        heads: Attention heads, which a file does not tell; None takes those of the published decoder of its width.
    """

    encoder: str = "timm/vit_base_patch14_reg4_dinov2@lvd142m"
    encoder_options: Mapping[str, Any] = attrs.field(factory=lambda: {"norm": "plain", "antialias": False})
    statistics: str | None = None
    heads: int | None = attrs.field(default=None, validator=v.optional(_positive))
