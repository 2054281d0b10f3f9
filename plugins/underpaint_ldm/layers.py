"""The layers that the encoder and the decoder are made of (Rombach et al. 2022)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from underpaint import GroupNorm
from underpaint_ldm.config import groups_of

__all__ = ["Attention", "Double", "Halve", "Residual", "middle", "norm"]


def norm(channels: int, groups: int | None) -> GroupNorm:
    """Return the normalisation of a layer; see the option `groups`."""
    return GroupNorm(groups_of(channels, groups), channels, eps=1e-6)


class Residual(nn.Module):
    """Two normalised 3×3 convolutions beside a skip connection, which is a 1×1 convolution where channels change."""

    def __init__(self, inputs: int, outputs: int, groups: int | None) -> None:
        super().__init__()
        self.norm1 = norm(inputs, groups)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = norm(outputs, groups)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return B×outputs×h×w of B×inputs×h×w."""
        h: Tensor = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        skip: Tensor = self.skip(x)
        return skip + h


class Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int, groups: int | None) -> None:
        super().__init__()
        self.norm = norm(channels, groups)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return B×C×h×w of B×C×h×w."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unsqueeze(1).chunk(3, dim=-1)
        mixed: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + mixed.transpose(1, 2).reshape(x.shape)


class Double(nn.Module):
    """Twice the height and width: nearest neighbour, 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return B×C×2h×2w of B×C×h×w."""
        doubled: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return doubled


class Halve(nn.Module):
    """Half the height and width: 3×3 convolution of stride 2, padded below and on the right only, as published."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return B×C×h/2×w/2 of B×C×h×w, for even h and w."""
        halved: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return halved


def middle(channels: int, groups: int | None) -> nn.Sequential:
    """Return two residual blocks with self-attention between them."""
    return nn.Sequential(
        Residual(channels, channels, groups), Attention(channels, groups), Residual(channels, channels, groups)
    )
