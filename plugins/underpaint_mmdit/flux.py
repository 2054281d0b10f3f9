"""The transformer of FLUX.1."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from underpaint import Condition
from underpaint_mmdit.base import TextBackbone
from underpaint_mmdit.block import Heads, JointBlock, Rotation, attend, key_mask, modulate, rotate
from underpaint_mmdit.config import FluxConfig
from underpaint_mmdit.embeddings import TIMES, rotations, time_sinusoids, vector_mlp

__all__ = ["Flux", "SingleBlock"]


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the joined tokens, each side of them one matrix (Dehghani et al. 2023)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 3 * width)
        self.first = nn.Linear(width, 3 * width + hidden)
        self.heads = Heads(width, heads, "rms")
        self.activation = nn.GELU(approximate="tanh")
        self.second = nn.Linear(width + hidden, width)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None, rotation: Rotation) -> Tensor:
        """Return B×(L + N)×C tokens; see `JointBlock` for the arguments."""
        shift, scale, gate = self.modulation(condition).chunk(3, dim=1)
        c = x.shape[2]
        projected, hidden = self.first(modulate(self.norm(x), shift, scale)).tensor_split([3 * c], dim=2)
        q, k, v = self.heads(projected)
        mixed = attend(rotate(q, rotation), rotate(k, rotation), v, mask)
        result: Tensor = x + gate.unsqueeze(1) * self.second(torch.cat((mixed, self.activation(hidden)), dim=2))
        return result


class Flux(TextBackbone):
    """Blocks with a stream for text and one for the image, then blocks for both as one sequence, with rotary positions.

    Published as code and weights only (Black Forest Labs 2024). The latent is cut into patches here; the published code
    does so outside its network, which has patch 1. A guidance-distilled model is told the strength `guidance`, which
    may be changed at any time. The published networks hide no padding; here a mask does, where the condition has one.

    Attributes:
        guidance: Strength that a guidance-distilled model is told; None for other models.

    Raises:
        ConfigError: The patch does not divide the grid, or the condition has no tokens.
    """

    def __init__(
        self, config: FluxConfig, *, latent_channels: int, grid: tuple[int, int], pooled_dim: int, token_dim: int
    ) -> None:
        super().__init__(config, latent_channels=latent_channels, grid=grid, pooled_dim=pooled_dim, token_dim=token_dim)
        self.guidance = config.guidance
        self.axes = config.axes
        self.strength = None if config.guidance is None else vector_mlp(TIMES, config.width)
        self.joint_layers = nn.ModuleList(
            JointBlock(config.width, config.heads, config.mlp_ratio, "rms") for _ in range(config.double)
        )
        self.single_layers = nn.ModuleList(
            SingleBlock(config.width, config.heads, config.mlp_ratio) for _ in range(config.single)
        )
        self.initialise()

    def vector(self, t: Tensor, condition: Condition) -> Tensor:
        """Return the B×width vector that modulates, from times, pooled texts and the strength of guidance."""
        vector = super().vector(t, condition)
        if self.strength is None or self.guidance is None:
            return vector
        result: Tensor = vector + self.strength(time_sinusoids(torch.full_like(t, self.guidance)).to(vector.dtype))
        return result

    def transform(
        self,
        text: Tensor,
        image: Tensor,
        vector: Tensor,
        mask: Tensor | None,
        grid: tuple[int, int],
        layers: Collection[int],
        hidden: dict[int, Tensor],
    ) -> Tensor:
        """Run the double blocks, then the single ones on text and image joined."""
        count = text.shape[1]
        rotation = rotations(count, *grid, self.axes, image.device)
        keys = key_mask(mask, image.shape[1])
        for index, block in enumerate(self.joint_layers):
            text, image = self.run(block, text, image, vector, keys, rotation)
            if index in layers:
                hidden[index] = image
        joined = torch.cat((text, image), dim=1)
        for index, block in enumerate(self.single_layers, start=len(self.joint_layers)):
            joined = self.run(block, joined, vector, keys, rotation)
            if index in layers:
                hidden[index] = joined[:, count:]
        return joined[:, count:]

    def blocks(self) -> list[nn.Module]:
        """Return the double blocks, then the single ones."""
        return [*self.joint_layers, *self.single_layers]
