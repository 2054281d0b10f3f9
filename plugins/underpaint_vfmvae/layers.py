"""Layers of the decoder: style modulation, ConvNeXt, self-attention, upsampling, RGB."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from underpaint import ConfigError, GroupNorm

__all__ = ["ConvNeXt", "EqualLinear", "Mapping", "SelfAttention", "ToRgb", "Upsample", "group_norm", "repeat_border"]


def group_norm(channels: int) -> GroupNorm:
    """Return the decoder's normalisation, of 32 groups, but at least four channels in each.

    Its eps is 1e-5, where latent diffusion's decoders have 1e-6. In the fusion the authors allow groups of a single
    channel (vfm_vae.md §3.2): at their widths that is the same, and with narrower maps of one cell, as a latent of 4×4
    has there, a norm over a single number would leave nothing.

    Raises:
        ConfigError: The channels do not divide into so many groups.
    """
    groups = min(32, max(1, channels // 4))
    if channels % groups:
        raise ConfigError(
            f"A map of the decoder has {channels} channels, which do not divide into {groups} normalisation groups; "
            "make width a multiple of 128 and base one of 32, or width 64 or less and base a multiple of 4."
        )
    return GroupNorm(groups, channels, eps=1e-5)


class EqualLinear(nn.Module):
    """A linear layer with an equalised learning rate (StyleGAN).

    Weights are stored with deviation 1/rate and used times rate/√inputs; the bias is used times rate.
    """

    def __init__(self, inputs: int, outputs: int, *, rate: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias / rate))
        self._rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Map B×inputs to B×outputs."""
        return F.linear(x, self.weight * (self._rate / math.sqrt(self.weight.shape[1])), self.bias * self._rate)


class Mapping(nn.Module):
    """Global code B×C to the style code w, B×C: divided by the root of its mean square, then two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = EqualLinear(width, width, rate=0.01)
        self.out = EqualLinear(width, width, rate=0.01)

    def forward(self, code: Tensor) -> Tensor:
        """Return w."""
        wide = _at_least_float32(code)
        unit = wide * (wide.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
        w: Tensor = self.out(F.leaky_relu(self.hidden(unit.to(code.dtype)), 0.2))
        return w


class _Style(EqualLinear):
    """w to one factor per channel: three linear images a, b, c of it give a·b + c."""

    def __init__(self, code: int, channels: int) -> None:
        super().__init__(code, 3 * channels, bias=1.0)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = _at_least_float32(super().forward(x)).chunk(3, dim=1)
        return a * b + c


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scaled(x: Tensor, style: Tensor) -> Tensor:
    return x * style.to(x.dtype)[:, :, None, None]


class ConvNeXt(nn.Module):
    """x + γ·F(x), B×C×h×w. F: depthwise convolution, noise, norm, modulated 1×1 to 4C, GELU, 1×1 to C.

    Modulation multiplies the weights W_oi of the first 1×1 convolution by a style s_i of the sample, and divides each
    row by its norm. Factors of the columns can be taken on the input and those of the rows on the output, so the
    samples of a batch share one convolution.

    Args:
        channels: C.
        code: Width of w.
        kernel: Side of the depthwise convolution.
        noise: Kind of the noise map; see `DecoderConfig`.
        side: Side of the noise map.
    """

    def __init__(
        self, channels: int, code: int, kernel: int, noise: Literal["none", "learned", "fixed"], side: int
    ) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.noise = None if noise == "none" else _Noise(side, learned=noise == "learned")
        self.norm = group_norm(channels)
        self.style = _Style(code, channels)
        self.widen = nn.Conv2d(channels, 4 * channels, 1)
        self.narrow = nn.Conv2d(4 * channels, channels, 1)
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), 1e-5))
        for conv in (self.depthwise, self.widen, self.narrow):
            assert conv.bias is not None
            nn.init.trunc_normal_(conv.weight, std=0.02)
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Return B×C×h×w for w of B×code."""
        y = self.depthwise(x)
        if self.noise is not None:
            y = y + self.noise(y.shape[-2], y.shape[-1])
        style = self.style(w)
        rows = F.linear(style.square(), self.widen.weight.flatten(1).to(style.dtype).square())
        assert self.widen.bias is not None
        y = F.conv2d(_scaled(self.norm(y), style), self.widen.weight)
        y = _scaled(y, (rows + 1e-8).rsqrt()) + self.widen.bias[:, None, None]
        changed: Tensor = x + self.gamma * self.narrow(F.gelu(y))
        return changed


class _Noise(nn.Module):
    """A map that is the same for every sample and channel, resized to the features."""

    map: Tensor

    def __init__(self, side: int, *, learned: bool) -> None:
        super().__init__()
        self.register_buffer("map", torch.randn(side, side))
        # As in StyleGAN, noise begins without effect.
        self.strength = nn.Parameter(torch.zeros(())) if learned else None

    def forward(self, height: int, width: int) -> Tensor:
        noise = self.map[None, None]
        if self.strength is not None:
            noise = noise * self.strength
        if noise.shape[-2:] == (height, width):
            return noise
        return F.interpolate(noise, (height, width), mode="bilinear", align_corners=False, antialias=False)


class SelfAttention(nn.Module):
    """Attention over all cells and a feed-forward layer, both residual and both zero at first (GigaGAN).

    A learned key and value stand before those of the cells.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm = _ChannelNorm(channels)
        self.query = nn.Conv2d(channels, channels, 1, bias=False)
        self.key = nn.Conv2d(channels, channels, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1, bias=False)
        self.null = nn.Parameter(0.02 * torch.randn(2, heads, channels // heads))
        self.out = nn.Conv2d(channels, channels, 1, bias=False)
        self.mlp_norm = _ChannelNorm(channels)
        self.mlp_in = nn.Conv2d(channels, 4 * channels, 1)
        self.mlp_out = nn.Conv2d(4 * channels, channels, 1)
        assert self.mlp_out.bias is not None
        for zero in (self.out.weight, self.mlp_out.weight, self.mlp_out.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """Return B×C×h×w."""
        x = x + self.out(self._attend(self.norm(x)))
        grown: Tensor = x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return grown

    def _attend(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        heads = self.null.shape[1]
        q, k, v = (
            project(x).reshape(batch, heads, channels // heads, -1).transpose(2, 3)
            for project in (self.query, self.key, self.value)
        )
        null = self.null[:, None, :, None].expand(-1, batch, -1, -1, -1)
        mixed = F.scaled_dot_product_attention(q, torch.cat((null[0], k), dim=2), torch.cat((null[1], v), dim=2))
        return mixed.transpose(2, 3).reshape(batch, channels, height, width)


class _ChannelNorm(nn.Module):
    """Each cell's channels divided by their root mean square, times a learned gain."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * (math.sqrt(x.shape[1]) * self.gain)


class Upsample(nn.Module):
    """B×inputs×h×w to B×outputs×2h×2w: norm, depthwise 3×3, 1×1, pixel shuffle, and a fixed binomial blur.

    Args:
        inputs: Channels.
        outputs: Channels.
        blur: Side of the blur, 3 or 5.
        norm_last: Normalise after the shuffle instead.
    """

    kernel: Tensor

    def __init__(self, inputs: int, outputs: int, *, blur: int, norm_last: bool = False) -> None:
        super().__init__()
        self.norm = group_norm(outputs if norm_last else inputs)
        self.depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        self.pointwise = nn.Conv2d(inputs, 4 * outputs, 1, bias=False)
        self._norm_last = norm_last
        row = torch.tensor([float(math.comb(blur - 1, k)) for k in range(blur)])
        self.register_buffer("kernel", torch.outer(row, row) / row.sum() ** 2, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the doubled map."""
        if not self._norm_last:
            x = self.norm(x)
        x = F.pixel_shuffle(self.pointwise(self.depthwise(x)), 2)
        if self._norm_last:
            x = self.norm(x)
        side = self.kernel.shape[0]
        channels = x.shape[1]
        x = repeat_border(repeat_border(x, 2, side // 2, side // 2), 3, side // 2, side // 2)
        return F.conv2d(x, self.kernel.expand(channels, 1, side, side), groups=channels)


def repeat_border(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """Repeat the first row (dimension 2) or column (3) `before` times and the last `after`, as `F.pad` can.

    The gradient of `F.pad` is summed in no fixed order on a GPU, and compiled for a CPU it has other strides than torch
    2.14 takes it to have.
    """

    def repeat(index: int, count: int) -> Tensor:
        size = [-1] * x.dim()
        size[dim] = count
        return x.narrow(dim, index, 1).expand(size)

    return torch.cat((repeat(0, before), x, repeat(x.shape[dim] - 1, after)), dim)


class ToRgb(nn.Module):
    """B×C×h×w to B×3×h×w by a 1×1 convolution whose weights are modulated, not normalised; the output is linear."""

    def __init__(self, channels: int, code: int) -> None:
        super().__init__()
        self.style = _Style(code, channels)
        self.weight = nn.Parameter(0.1 * torch.randn(3, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Return the image for w of B×code."""
        return F.conv2d(_scaled(x, self.style(w) / math.sqrt(x.shape[1])), self.weight, self.bias)
