"""Residual convolutions from a latent to an image (Rombach et al. 2022; VA-VAE's settings)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from underpaint import ConfigError, Reconstruction
from underpaint import Decoder as DecoderInterface
from underpaint_ldm.config import DecoderConfig
from underpaint_ldm.layers import Attention, Double, Residual, middle, norm

__all__ = ["Decoder"]

_MULTIPLIERS = {4: (1, 2, 4), 8: (1, 2, 4, 4), 16: (1, 1, 2, 2, 4)}


class Decoder(DecoderInterface):
    """B×d×h×w latents, of any h and w, to images of h·stride × w·stride pixels.

    1×1 and 3×3 convolution, two residual blocks with self-attention between them at the latent's resolution, then
    per level residual blocks and a doubling (nearest neighbour, 3×3 convolution), last a normalised 3×3 convolution
    to RGB. There is no tanh: images are nominally in [-1, 1] and may leave it.

    Raises:
        ConfigError: The multipliers do not fit the stride.
    """

    def __init__(self, config: DecoderConfig, *, latent_channels: int, stride: int) -> None:
        super().__init__()
        widths = [config.base * m for m in _multipliers(config, stride)]
        deepest = widths[-1]
        self.post_quant_conv = (
            nn.Conv2d(latent_channels, latent_channels, 1) if config.post_quant_conv else nn.Identity()
        )
        self.conv_in = nn.Conv2d(latent_channels, deepest, 3, padding=1)
        self.middle = middle(deepest, config.groups)
        levels: list[nn.Module] = []
        channels = deepest
        for depth, width in enumerate(reversed(widths)):
            if depth:
                levels.append(Double(channels))
            for _ in range(config.blocks):
                levels.append(Residual(channels, width, config.groups))
                if config.attention and depth == 0:
                    levels.append(Attention(width, config.groups))
                channels = width
        self.levels = nn.Sequential(*levels)
        self.norm_out = norm(channels, config.groups)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Reconstruction:
        """Decode B×d×h×w latents."""
        x = self.post_quant_conv(latents.to(self.conv_in.weight.dtype))
        x = self.levels(self.middle(self.conv_in(x)))
        return Reconstruction(self.conv_out(F.silu(self.norm_out(x))))

    def last_layer(self) -> nn.Parameter:
        """Return the weight of the convolution to RGB."""
        weight = self.conv_out.weight
        assert isinstance(weight, nn.Parameter)
        return weight


def _multipliers(config: DecoderConfig, stride: int) -> tuple[int, ...]:
    if config.multipliers is None:
        if stride not in _MULTIPLIERS:
            raise ConfigError(
                f"The decoder 'ldm/decoder' has defaults for the strides {', '.join(map(str, _MULTIPLIERS))}, and the "
                f"encoder and adapter give {stride}; choose an encoder of another stride, or set 'multipliers' if "
                f"{stride} is a power of 2."
            )
        return _MULTIPLIERS[stride]
    if 2 ** (len(config.multipliers) - 1) != stride:
        raise ConfigError(
            f"{len(config.multipliers)} multipliers make a decoder of stride {2 ** (len(config.multipliers) - 1)}, and "
            f"the encoder and adapter give {stride}; the number of multipliers is 1 + log2(stride)."
        )
    return config.multipliers
