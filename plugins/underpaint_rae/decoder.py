"""The ViT decoder of RAE: one token for each latent cell, one patch of pixels from each token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from underpaint import Decoder, Reconstruction
from underpaint_rae.config import ViTDecoderConfig

__all__ = ["ViTDecoder", "grid_positions"]

# That of the published decoders. Larger ones damp tokens of small variance.
_EPS = 1e-12


class ViTDecoder(Decoder):
    """B×d×h×w latents, of any h and w, to images of h·stride × w·stride pixels (rae.md §2.3).

    A linear embedding of each cell, fixed sine-cosine positions, a class token that learns and is dropped at the end,
    pre-norm transformer blocks, a norm and a linear layer to the pixels of a patch. As in MAE (He et al. 2022), the
    pixels are in the encoder's normalised colours; the output is brought back to [-1, 1] and not clamped.

    RAE's own code resizes latents of another grid than it was trained on; here positions are computed for the grid.
    """

    def __init__(self, config: ViTDecoderConfig, *, latent_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        # Numbers, not buffers: a buffer would be rounded when the module becomes bfloat16. [0, 1] becomes [-1, 1].
        self.scale = tuple(2.0 * std for std in config.std)
        self.shift = tuple(2.0 * mean - 1.0 for mean in config.mean)
        self.embed = nn.Linear(latent_channels, config.width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.blocks = nn.ModuleList(_Block(config.width, config.heads, config.hidden) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=_EPS)
        self.pixels = nn.Linear(config.width, stride * stride * 3)

    def forward(self, latents: Tensor) -> Reconstruction:
        """Decode B×d×h×w latents."""
        b, _, h, w = latents.shape
        cells = latents.to(self.embed.weight.dtype).flatten(2).transpose(1, 2)
        tokens: Tensor = self.embed(cells)
        tokens = tokens + grid_positions(h, w, tokens.shape[-1], tokens.device).to(tokens.dtype)
        # The class token stands at no position.
        tokens = torch.cat((self.class_token.expand(b, -1, -1), tokens), dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        patches: Tensor = self.pixels(self.norm(tokens[:, 1:]))
        image = patches.view(b, h, w, self.stride, self.stride, 3).permute(0, 5, 1, 3, 2, 4)
        image = image.reshape(b, 3, h * self.stride, w * self.stride)
        colours = [image[:, i : i + 1] * self.scale[i] + self.shift[i] for i in range(3)]
        return Reconstruction(torch.cat(colours, dim=1))

    def last_layer(self) -> nn.Parameter:
        """Return the weight of the linear layer to pixels, where RAE measures gradient ratios."""
        weight = self.pixels.weight
        assert isinstance(weight, nn.Parameter)
        return weight


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.out(mixed)
        refined: Tensor = x + self.mlp(self.norm2(x))
        return refined


def grid_positions(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return fixed 2-D positions, float32 of (rows·columns)×width, row by row (MAE; He et al. 2022).

    The first half of the channels encodes the column and the second half the row, each as sines, then cosines, of the
    index times 10000^(−4i/width).
    """
    steps = torch.arange(width // 4, dtype=torch.float64, device=device)
    frequencies = torch.exp(steps * (-4.0 * math.log(10_000.0) / width))

    def axis(length: int) -> Tensor:
        angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=1)

    along, down = axis(columns).expand(rows, -1, -1), axis(rows)[:, None].expand(-1, columns, -1)
    return torch.cat((along, down), dim=2).reshape(rows * columns, width).float()
