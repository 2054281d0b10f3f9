"""What MMDiT and FLUX have in common: everything before and after their blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from underpaint import Backbone, Condition, ConfigError, DataError, Prediction
from underpaint_mmdit.block import modulate
from underpaint_mmdit.config import FluxConfig, MMDiTConfig
from underpaint_mmdit.embeddings import TIMES, patches, time_sinusoids, unpatch, vector_mlp

__all__ = ["TextBackbone"]


class TextBackbone(Backbone):
    """A transformer over image and text tokens, modulated by time and the pooled text.

    Attributes:
        width: Channels of the hidden states.
        patch: Latent cells of one token, per side.
        latent_channels: Channels of the latents.
        recompute: Whether blocks recompute their activations in the backward pass.

    Raises:
        ConfigError: The patch does not divide the grid, or the condition has no tokens.
    """

    def __init__(
        self,
        config: MMDiTConfig | FluxConfig,
        *,
        latent_channels: int,
        grid: tuple[int, int],
        pooled_dim: int,
        token_dim: int,
    ) -> None:
        super().__init__()
        patch = config.patch
        if not token_dim:
            raise ConfigError(
                "The backbones 'mmdit/*' and 'flux/*' read tokens, and the conditioner gives none; choose one for "
                "texts, such as 'text/hf', or a backbone for labels, such as 'sit/B-1'."
            )
        if grid[0] % patch or grid[1] % patch:
            raise ConfigError(
                f"A latent of {grid[0]}×{grid[1]} cells does not divide into patches of {patch}×{patch}; "
                "choose a backbone of a smaller patch, such as 'mmdit/d12-1'."
            )
        self.width = width = config.width
        self.patch = patch
        self.latent_channels = latent_channels
        self.recompute = config.recompute
        cells = patch**2 * latent_channels
        self.embed = nn.Linear(cells, width)
        self.tokens = nn.Linear(token_dim, width)
        self.time = vector_mlp(TIMES, width)
        # Also where the widths agree: a text encoder's vector is not made for this network, as a label table is.
        self.pooled = vector_mlp(pooled_dim, width) if pooled_dim else None
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, cells)

    def initialise(self) -> None:
        """Set the initial weights; called by the constructors of the networks.

        Those of DiT (Peebles & Xie 2023): Xavier for matrices, small normal for the time MLP, zero for what modulates
        and for the head. Every block begins as the identity, and the first prediction is zero.
        """
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if name == "head" or name.endswith("modulation"):
                nn.init.zeros_(module.weight)
            elif name.startswith("time."):
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, layers: Collection[int] = ()) -> Prediction:
        """Predict the velocity, in the type of `x_t`; hidden states are B×N×width, image tokens only, row by row.

        Raises:
            DataError: The patch does not divide the latent, the condition is not the one it was made for, or a layer
                is asked for that it does not have.
        """
        self._check(x_t, condition, layers)
        assert condition.tokens is not None
        dtype = self.embed.weight.dtype
        grid = (x_t.shape[2] // self.patch, x_t.shape[3] // self.patch)
        vector = F.silu(self.vector(t, condition))
        image = self.embed(patches(x_t.to(dtype), self.patch))
        text = self.tokens(condition.tokens.to(dtype))
        hidden: dict[int, Tensor] = {}
        image = self.transform(text, image, vector, condition.mask, grid, layers, hidden)
        shift, scale = self.modulation(vector).chunk(2, dim=1)
        out = self.head(modulate(self.norm(image), shift, scale))
        return Prediction(unpatch(out, grid, self.patch).to(x_t.dtype), hidden)

    def vector(self, t: Tensor, condition: Condition) -> Tensor:
        """Return the B×width vector that modulates, from times and pooled texts."""
        dtype = self.embed.weight.dtype
        vector: Tensor = self.time(time_sinusoids(t).to(dtype))
        if self.pooled is not None:
            assert condition.pooled is not None
            vector = vector + self.pooled(condition.pooled.to(dtype))
        return vector

    @abstractmethod
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
        """Run the blocks.

        Args:
            text: B×L×width.
            image: B×N×width, without positions.
            vector: B×width, already passed through SiLU.
            mask: B×L, True where a text token counts, or None.
            grid: Rows and columns of the image tokens.
            layers: Blocks whose hidden states are wanted.
            hidden: Receives them, image tokens only.

        Returns:
            B×N×width.
        """

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        """Call a block, so that it recomputes its activations where the options say so."""
        if self.recompute and self.training:
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def _check(self, x_t: Tensor, condition: Condition, layers: Collection[int]) -> None:
        rows, columns = x_t.shape[2:]
        if rows % self.patch or columns % self.patch:
            raise DataError(
                f"A latent of {rows}×{columns} cells does not divide into patches of {self.patch}×{self.patch}; "
                f"give sides that are multiples of {self.patch}."
            )
        for what, given, made in (
            ("tokens", condition.tokens is not None, True),
            ("a pooled vector", condition.pooled is not None, self.pooled is not None),
        ):
            if given != made:
                with_it, without = ("with", "without") if made else ("without", "with")
                raise DataError(
                    f"This backbone was made for conditions {with_it} {what} and was given one {without}; "
                    "use the conditioner that it was made for."
                )
        count = len(self.blocks())
        for layer in layers:
            if not 0 <= layer < count:
                raise DataError(
                    f"Layer {layer} was asked for, and the backbone has {count} blocks; layers are 0 to {count - 1}."
                )
