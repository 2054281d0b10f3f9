"""The decoder: blocks of doubling resolution, each fed with the latent and giving an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from underpaint import ConfigError, Reconstruction
from underpaint import Decoder as DecoderInterface
from underpaint_vfmvae.config import DecoderConfig
from underpaint_vfmvae.layers import ConvNeXt, Mapping, SelfAttention, ToRgb, Upsample, group_norm, repeat_border
from underpaint_vfmvae.projection import AttentionProjection

__all__ = ["Decoder"]

_COARSEST = 4
"""Latent cells, per side, that one cell before the first block covers."""

_NATIVE = 16
"""Side of the latent that the noise maps are made for: 256 px at stride 16."""


class Decoder(DecoderInterface):
    """B×d×h×w latents to images of h·stride × w·stride pixels, and coarser ones, each half as large as the next.

    The latent is expanded to u, of `width` channels. Its mean over the cells becomes the style code w, which modulates
    every layer, and rearranged copies of it enter the first four blocks: unshuffled 4× and 2×, as it is, and shuffled
    2×. Block i gives a map of h·2^i/2 cells a side. A second path sums the outputs of the blocks, upsampled, and w
    turns the sum into the image of each size.

    Any h and w are possible. Where one is no multiple of 4, u is repeated at its end up to the next multiple, and the
    images are cut; the coarsest image is left out when h or w is odd.

    Attributes:
        expand: Latent to u.
        mapping: Mean of u to w.
        fusion: Copies of u for the first four blocks.
        blocks: The blocks, coarse to fine. At stride 16 and 256 px they give 8, 16, 32, 64, 128 and 256 px.

    Raises:
        ConfigError: The stride is no power of two, or the options do not fit.
    """

    def __init__(self, config: DecoderConfig, *, latent_channels: int, stride: int) -> None:
        super().__init__()
        if stride < 2 or stride & (stride - 1):
            raise ConfigError(
                f"The decoder 'vfmvae/decoder' doubles the latent's resolution step by step, and the encoder and "
                f"adapter together give a stride of {stride} px, where 2, 4, 8, 16 or 32 would do; set "
                "tokenizer.stride to one of these, and the encoder is fitted to it."
            )
        count = stride.bit_length() + 1
        widths = [min(config.base * 2 ** (count - 1 - i), config.width) for i in range(count)]
        wrong = [width for width in widths[:3] if width % config.heads]
        if wrong:
            raise ConfigError(
                f"heads is {config.heads}, and a block with attention has {wrong[0]} channels; make it a divisor."
            )
        self.expand = AttentionProjection(latent_channels, config.width)
        self.mapping = Mapping(config.width)
        self.fusion = nn.ModuleList(_Fusion(config.width, index) for index in range(min(4, count)))
        self.blocks = nn.ModuleList(
            _Block(config, index, widths[index - 1] if index else 0, widths[index]) for index in range(count)
        )

    def forward(self, latents: Tensor) -> Reconstruction:
        """Decode B×d×h×w latents."""
        rows, columns = latents.shape[-2:]
        z = latents.to(self.expand.skip.weight.dtype)
        tokens = self.expand(z.flatten(2).transpose(1, 2))
        w = self.mapping(tokens.mean(dim=1))
        u = tokens.transpose(1, 2).reshape(len(tokens), -1, rows, columns)
        u = repeat_border(repeat_border(u, 2, 0, -rows % _COARSEST), 3, 0, -columns % _COARSEST)
        x: Tensor | None = None
        total: Tensor | None = None
        images = []
        for index, block in enumerate(self.blocks):
            copy = self.fusion[index](u) if index < len(self.fusion) else None
            given = [part for part in (x, copy) if part is not None]
            x, total, image = block(torch.cat(given, dim=1), total, w)
            height, width = rows * 2**index, columns * 2**index
            if height % 2 == 0 and width % 2 == 0:
                images.append(image[..., : height // 2, : width // 2])
        return Reconstruction(images[-1], tuple(images[:-1]))

    def last_layer(self) -> nn.Parameter:
        """Return the weight that makes the colours of the finest image."""
        head = self.blocks[-1].rgb
        assert isinstance(head, ToRgb)
        return head.weight


def _fused(width: int, index: int) -> int:
    """Channels of the copy of the latent that block `index` receives."""
    return width // (1, 2, 4, 4)[index]


class _Fusion(nn.Module):
    """u, rearranged to the resolution before block `index` and mixed: depthwise 3×3, 1×1, norm, leaky ReLU, 1×1, norm.

    The pixel shuffle for block 3 comes after the activation.
    """

    def __init__(self, width: int, index: int) -> None:
        super().__init__()
        self._unshuffle = max(1, 4 >> index)
        self._shuffle = 2 if index == 3 else 1
        inputs, outputs = width * self._unshuffle**2, _fused(width, index)
        inner = outputs * self._shuffle**2
        self.depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        self.pointwise = nn.Conv2d(inputs, inner, 1, bias=False)
        self.norm = group_norm(inner)
        self.mix = nn.Conv2d(outputs, outputs, 1, bias=False)
        self.mix_norm = group_norm(outputs)

    def forward(self, u: Tensor) -> Tensor:
        x = F.pixel_unshuffle(u, self._unshuffle)
        x = F.leaky_relu(self.norm(self.pointwise(self.depthwise(x))), 0.2)
        mixed: Tensor = self.mix_norm(self.mix(F.pixel_shuffle(x, self._shuffle)))
        return mixed


class _Block(nn.Module):
    """One doubling: upsample, ConvNeXt layers, attention where the grid is small, and the image of this size."""

    def __init__(self, config: DecoderConfig, index: int, previous: int, width: int) -> None:
        super().__init__()
        self._recompute = config.recompute
        inputs = previous + (_fused(config.width, index) if index < 4 else 0)
        blur = 3 if index < 3 else 5
        # Block 0 has nothing to normalise before: what it is given comes out of the fusion's own norm.
        self.upsample = Upsample(inputs, width, blur=blur, norm_last=index == 0)
        self.rgb_upsample = Upsample(previous, width, blur=blur) if index else None
        side = _NATIVE * 2**index // 2
        self.layers = nn.ModuleList(
            ConvNeXt(width, config.width, 5 if index < 2 else 7, config.noise, side)
            for _ in range(config.depths[0 if index < 4 else 1])
        )
        self.attention = nn.ModuleList(SelfAttention(width, config.heads) for _ in range(2 if index < 3 else 0))
        self.rgb = ToRgb(width, config.width)

    def forward(self, x: Tensor, total: Tensor | None, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the map, the sum of the maps so far, and the image."""
        x = self.upsample(x)
        recompute = self._recompute and torch.is_grad_enabled()
        for layer in self.layers:
            x = checkpoint(layer, x, w, use_reentrant=False, preserve_rng_state=False) if recompute else layer(x, w)
        for attention in self.attention:
            x = attention(x)
        if self.rgb_upsample is not None:
            assert total is not None
            total = x + self.rgb_upsample(total)
        else:
            total = x
        return x, total, self.rgb(total, w)
