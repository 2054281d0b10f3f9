"""Residual convolutions from an image to features (Rombach et al. 2022; VA-VAE's settings)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from underpaint import Encoder as EncoderInterface
from underpaint import EncoderInfo, Features
from underpaint_ldm.config import EncoderConfig
from underpaint_ldm.layers import Attention, Halve, Residual, middle, norm

__all__ = ["Encoder"]


class Encoder(EncoderInterface):
    """B×3×H×W images in [-1, 1], which are its normalised pixels, to one map of B×C×H/stride×W/stride.

    3×3 convolution, then per level residual blocks and a halving, two residual blocks with self-attention between them
    at the deepest resolution, last a norm and SiLU. The convolution to mean and log-variance that follows in the paper
    belongs to the adapter ``ldm/gaussian``. It is trained from scratch, or filled by an importer.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        widths = [config.base * m for m in config.multipliers]
        deepest = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.base, 3, padding=1)
        levels: list[nn.Module] = []
        channels = config.base
        for depth, width in enumerate(widths):
            if depth:
                levels.append(Halve(channels))
            for _ in range(config.blocks):
                levels.append(Residual(channels, width, config.groups))
                if config.attention and depth == deepest:
                    levels.append(Attention(width, config.groups))
                channels = width
        self.levels = nn.Sequential(*levels)
        self.middle = middle(channels, config.groups)
        self.norm_out = norm(channels, config.groups)
        stride = 2**deepest
        self.info = EncoderInfo(
            channels=(channels,),
            stride=stride,
            patch=stride,
            native_size=(256, 256),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            layers=(deepest,),
            licence="That of who trained it: it comes without weights.",
            source="random initialisation",
        )

    def forward(self, images: Tensor) -> Features:
        """Encode B×3×H×W images.

        Raises:
            DataError: Height or width is no multiple of the stride.
        """
        self.grid(images.shape[-2], images.shape[-1])
        x = self.conv_in(images.to(self.conv_in.weight.dtype))
        x = self.middle(self.levels(x))
        return Features(maps=(F.silu(self.norm_out(x)),))
