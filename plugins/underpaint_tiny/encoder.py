"""A small vision transformer."""

from __future__ import annotations

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from underpaint import DataError, Encoder, EncoderInfo, Features, NotFoundError, is_location, load_weights
from underpaint_tiny.config import TinyViTConfig

__all__ = ["TinyViT"]

_NATIVE_SIZE = 64
_SEED = zlib.crc32(b"tiny/vit")
"""From the name, so that every machine and every run starts from the same random weights."""


class TinyViT(Encoder):
    """A pre-norm vision transformer without class token, for images of about 32 to 128 px, also oblong.

    Its random weights keep the image: the patch embedding is orthogonal and each block adds little to its
    input, so a linear map recovers most of the pixels. They are the same on every machine. Positions are
    sines and cosines over the whole image, whatever its grid.

    ``pooled`` is the mean of the last block's tokens after the final norm.

    Args:
        config: Options.
        weights: ``random`` or None for the fixed random weights; ``file:PATH`` or a URL for saved ones.
        load: False builds the network that `weights` belong to without reading them, for a saved state to fill.

    Raises:
        NotFoundError: The weights are neither random nor a file.
        DataError: The file does not fit.
    """

    def __init__(self, config: TinyViTConfig, *, weights: str | None = None, load: bool = True) -> None:
        super().__init__()
        if weights not in (None, "random") and not is_location(str(weights)):
            raise NotFoundError(
                f"tiny/vit has no weights '{weights}'; write 'tiny/vit@random' or 'tiny/vit@file:PATH'."
            )
        self.patch_embed = nn.Conv2d(3, config.width, config.patch, config.patch)
        self.blocks = nn.ModuleList(_Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self._initialise()
        located = weights is not None and is_location(weights)
        if located and load:
            self._load(str(weights))
        self.info = EncoderInfo(
            channels=(config.width,) * len(config.blocks),
            stride=config.patch,
            patch=config.patch,
            native_size=(_NATIVE_SIZE, _NATIVE_SIZE),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            layers=config.blocks,
            licence="Not stated by the file." if located else "Apache-2.0",
            source=str(weights) if located else f"random initialisation with seed {_SEED}",
        )

    def forward(self, images: Tensor) -> Features:
        """Encode B×3×H×W images in [-1, 1], which are its normalised pixels, to B×C×(H/patch)×(W/patch) maps."""
        h, w = self.grid(images.shape[-2], images.shape[-1])
        embedded = self.patch_embed(images.to(self.patch_embed.weight.dtype))
        x = embedded.flatten(2).transpose(1, 2)
        x = x + _positions(h, w, x.shape[-1], x.device).to(x.dtype)
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.info.layers:
                maps.append(self.norm(x).transpose(1, 2).reshape(len(x), -1, h, w))
        return Features(maps=tuple(maps), pooled=self.norm(x).mean(dim=1))

    def _initialise(self) -> None:
        generator = torch.Generator().manual_seed(_SEED)
        residual = 0.5 * (2 * len(self.blocks)) ** -0.5
        for name, parameter in self.named_parameters():
            # On the CPU whatever the default device, so that the numbers depend on the seed alone.
            value = torch.zeros(parameter.shape, device="cpu")
            if name == "patch_embed.weight":
                nn.init.orthogonal_(value, generator=generator)
            elif parameter.ndim == 2:
                value.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
                # The 2·depth branches add up to less than the embedding: random mixing hides the image.
                value *= residual if name.endswith(("attention_out.weight", "mlp_out.weight")) else 1.0
            elif name.endswith("weight"):
                value.fill_(1.0)
            with torch.no_grad():
                parameter.copy_(value)

    def _load(self, location: str) -> None:
        wanted, given = self.state_dict(), load_weights(location)
        wrong = [key for key in wanted if key not in given or given[key].shape != wanted[key].shape]
        wrong += [key for key in given if key not in wanted]
        if wrong:
            raise DataError(
                f"The file '{location}' does not fit tiny/vit with these options: {len(wrong)} tensors are missing, "
                f"unexpected or of another shape ({', '.join(wrong[:3])}{', …' * (len(wrong) > 3)}); give the width, "
                "depth and patch that it was saved with."
            )
        self.load_state_dict(given)


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
