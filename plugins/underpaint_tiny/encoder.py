"""A small vision transformer."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from underpaint import DataError, Encoder, EncoderInfo, Features, NotFoundError, is_location, load_weights
from underpaint_tiny.config import TinyViTConfig
from underpaint_tiny.shipped import CARD, read_shipped

__all__ = ["TinyViT"]

_NATIVE_SIZE = 64
_SEED = zlib.crc32(b"tiny/vit")
"""From the name, so that every machine and every run starts from the same random weights."""


class TinyViT(Encoder):
    """A pre-norm vision transformer with a convolutional stem and without class token, about 5 M parameters.

    Made for images of 32 to 128 px, also oblong. Positions are sines and cosines over the whole image, whatever its
    grid. ``pooled`` is the mean of the deepest built block's tokens after the final norm.

    Args:
        config: Options.
        weights: None for the trained weights that come with the package, ``random`` for fixed random ones, the same on
            every machine; ``file:PATH`` or a URL for saved ones.
        load: False builds the network that `weights` belong to without reading them, for a saved state to fill.

    Raises:
        NotFoundError: The weights are none of these.
        DataError: The file does not fit, or is not the one that belongs to the package.
    """

    def __init__(self, config: TinyViTConfig, *, weights: str | None = None, load: bool = True) -> None:
        super().__init__()
        if weights not in (None, "random") and not is_location(str(weights)):
            raise NotFoundError(
                f"tiny/vit has no weights '{weights}'; write 'tiny/vit', 'tiny/vit@random' or 'tiny/vit@file:PATH'."
            )
        self.stem = _stem(config)
        self.blocks = nn.ModuleList(_Block(config.width, config.heads) for _ in range(max(config.blocks) + 1))
        self.norm = nn.LayerNorm(config.width)
        self._depth = config.depth
        self._initialise()
        licence, source = "Apache-2.0", f"random initialisation with seed {_SEED}"
        if weights is None:
            licence, source = CARD.licence, CARD.source
            if load:
                self._fill(read_shipped(), "that comes with the package")
        elif is_location(weights):
            licence, source = "Not stated by the file.", weights
            if load:
                self._fill(load_weights(weights), f"'{weights}'")
        self.info = EncoderInfo(
            channels=(config.width,) * len(config.blocks),
            stride=config.patch,
            patch=config.patch,
            native_size=(_NATIVE_SIZE, _NATIVE_SIZE),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            layers=config.blocks,
            licence=licence,
            source=source,
        )

    def forward(self, images: Tensor) -> Features:
        """Encode B×3×H×W images in [-1, 1], which are its normalised pixels, to B×C×(H/patch)×(W/patch) maps."""
        h, w = self.grid(images.shape[-2], images.shape[-1])
        embedded = self.stem(images.to(next(self.stem.parameters()).dtype))
        x = embedded.flatten(2).transpose(1, 2)
        x = x + _positions(h, w, x.shape[-1], x.device).to(x.dtype)
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.info.layers:
                maps.append(self.norm(x).transpose(1, 2).reshape(len(x), -1, h, w))
        return Features(maps=tuple(maps), pooled=maps[-1].flatten(2).mean(dim=2))

    def _initialise(self) -> None:
        generator = torch.Generator().manual_seed(_SEED)
        residual = 0.5 * (2 * self._depth) ** -0.5
        for name, parameter in self.named_parameters():
            # On the CPU whatever the default device, so that the numbers depend on the seed alone.
            value = torch.zeros(parameter.shape, device="cpu")
            if parameter.ndim >= 2:
                value.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
                value *= residual if name.endswith(("attention_out.weight", "mlp_out.weight")) else 1.0
            elif name.endswith("weight"):
                value.fill_(1.0)
            if parameter.ndim == 4:
                # The outer taps of a row and a column lie in the neighbours' cells.
                value[:, :, ::3] *= 0.3
                value[:, :, :, ::3] *= 0.3
            with torch.no_grad():
                parameter.copy_(value)

    def _fill(self, given: Mapping[str, Tensor], which: str) -> None:
        wanted = self.state_dict()
        later = tuple(f"blocks.{index}." for index in range(len(self.blocks), self._depth))
        wrong = [key for key in wanted if key not in given or given[key].shape != wanted[key].shape]
        wrong += [key for key in given if key not in wanted and not key.startswith(later)]
        if wrong:
            raise DataError(
                f"The file {which} does not fit tiny/vit with these options: {len(wrong)} tensors are missing, "
                f"unexpected or of another shape ({', '.join(wrong[:3])}{', …' * (len(wrong) > 3)}); give the width, "
                "depth and patch that it was saved with, or take random weights: 'tiny/vit@random'."
            )
        self.load_state_dict({key: given[key] for key in wanted})


def _stem(config: TinyViTConfig) -> nn.Sequential:
    doublings = config.patch.bit_length() - 1
    widths = [3, *(config.width >> (doublings - 1 - level) for level in range(doublings))]
    steps: list[nn.Module] = []
    for before, after in pairwise(widths):
        steps += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GroupNorm(1, after), nn.GELU()]
    return nn.Sequential(*steps[:-2])


class _Block(nn.Module):
    """Attention and MLP, each normed before and added to its input (Dosovitskiy et al. 2021, eq. 2 and 3)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        split = self.attention_in(self.attention_norm(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, tokens, width))
        moved: Tensor = x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return moved


def _positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Return 1×N×C sines and cosines of row and column, half of the channels each.

    Cell centres are placed in [0, 1] of the image, so a position means the same at every resolution.
    Frequencies run geometrically from half a wave per image to eight. Added to every patch alike, they are
    also what a patch's contrast can be told by after the final norm, which divides by the token's size.
    """
    waves = torch.logspace(-1, 3, channels // 4, base=2.0, device=device) * (2 * math.pi)
    rows = (torch.arange(height, device=device) + 0.5) / height
    columns = (torch.arange(width, device=device) + 0.5) / width
    parts = []
    for angles in (rows[:, None, None] * waves, columns[None, :, None] * waves):
        full = angles.expand(height, width, channels // 4)
        parts += [full.sin(), full.cos()]
    return torch.cat(parts, dim=-1).view(1, height * width, channels)
