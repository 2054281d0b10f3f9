"""Options of the adapter, the decoder, the pyramid loss and the importer. The defaults are the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs
from attrs import validators as v

from underpaint import ConfigError

__all__ = ["AdapterConfig", "DecoderConfig", "ImporterConfig", "PyramidConfig"]


@attrs.frozen(kw_only=True)
class AdapterConfig:
    """Options of ``vfmvae/adapter``.

    Attributes:
        width: Channels that each map is projected to before the maps are joined. The encoder's channels must be a
            multiple of it, or divide it.
        stride: Cells of the maps that one latent cell covers, per side.
    """

    width: int = attrs.field(default=64, validator=v.gt(0))
    stride: int = attrs.field(default=2, validator=v.gt(0))


@attrs.frozen(kw_only=True)
class DecoderConfig:
    """Options of ``vfmvae/decoder``.

    Attributes:
        width: Channels of the expanded latent, of the style code and of the widest blocks; a multiple or a divisor of
            the latent's channels.
        base: Channels of the finest block; each coarser one has twice as many, up to `width`. Every map must divide
            into its normalisation groups: any multiple of 32 will do where `width` is one of 128, and any multiple of
            4 where `width` is 64 or less.
        depths: ConvNeXt layers of the four blocks that the latent is fused into, and of the finer ones.
        heads: Attention heads in the three coarsest blocks.
        noise: A fixed random map for each ConvNeXt layer, added in it, as the published weights have: ``none``; with a
            factor that is ``learned``; or ``fixed``, without a factor. The authors advise against it in new training.
        recompute: Recompute the activations of each ConvNeXt layer in the backward pass: of an image of 256 px, 0.7 GB
            are kept for it in place of 3.4, for a third more work.
    """

    width: int = attrs.field(default=512, validator=v.gt(0))
    base: int = attrs.field(default=128, validator=v.gt(0))
    depths: tuple[int, int] = attrs.field(default=(7, 5))
    heads: int = attrs.field(default=8, validator=v.gt(0))
    noise: Literal["none", "learned", "fixed"] = "none"
    recompute: bool = False

    def __attrs_post_init__(self) -> None:
        if min(self.depths) < 1:
            raise ConfigError(f"depths is {list(self.depths)}; both must be 1 or more.")
        if self.width % 16:
            raise ConfigError(f"width is {self.width}; it must be a multiple of 16.")
        if self.base > self.width:
            raise ConfigError(
                f"base is {self.base}, above width, which is {self.width}; the finest block is narrowest."
            )


@attrs.frozen(kw_only=True)
class PyramidConfig:
    """Options of ``vfmvae/pyramid``.

    Attributes:
        interpolation: How the target is shrunk, always antialiased. The authors take ``bilinear`` with SigLIP 2 and
            ``bicubic`` with DINOv2, EVA-CLIP and Qwen2.5-VL.
    """

    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


def _siglip2_layers() -> dict[str, Any]:
    return {"stride": 8, "embedding": True, "layers": [11, 23], "norm": "last", "interpolation": "bilinear"}


@attrs.frozen(kw_only=True)
class ImporterConfig:
    """Options of ``vfm-vae``.

    Attributes:
        encoder: Encoder that the tokenizer was trained on. The file's own copy of it is not taken; where there is one,
            its patch embedding must be this encoder's.
        options: Options of the encoder. The default gives a 256 px image to SigLIP 2 as 512 px, and takes the tokens
            after the patch embedding, block 12 and the last block, the last one normalised.
        noise: What becomes of the noise maps of the published weights and their factors: ``fold`` multiplies them, so
            that the images are the same and nothing of them can learn; ``keep`` keeps the factors as parameters.
    """

    encoder: str = "timm/vit_large_patch16_siglip_512@v2_webli"
    options: Mapping[str, Any] = attrs.field(factory=_siglip2_layers)
    noise: Literal["fold", "keep"] = "fold"
