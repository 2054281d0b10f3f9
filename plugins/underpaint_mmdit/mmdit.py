"""The transformer of Stable Diffusion 3."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from underpaint import ConfigError, DataError
from underpaint_mmdit.base import TextBackbone
from underpaint_mmdit.block import JointBlock, key_mask
from underpaint_mmdit.config import MMDiTConfig
from underpaint_mmdit.embeddings import position_table

__all__ = ["MMDiT"]


class MMDiT(TextBackbone):
    """Image and text tokens in streams of their own that attend to each other (Esser et al. 2024, section 4).

    Positions are sines and cosines in a square table, of which a latent takes the middle; published files hold their
    table, so it is part of the saved state. The published networks hide no padding; here a mask does, where the
    condition has one.

    Raises:
        ConfigError: The patch does not divide the grid, the grid exceeds the table, or the condition has no tokens.
    """

    positions: Tensor

    def __init__(
        self, config: MMDiTConfig, *, latent_channels: int, grid: tuple[int, int], pooled_dim: int, token_dim: int
    ) -> None:
        super().__init__(config, latent_channels=latent_channels, grid=grid, pooled_dim=pooled_dim, token_dim=token_dim)
        if max(grid) > config.table * config.patch:
            raise ConfigError(
                f"A latent of {grid[0]}×{grid[1]} cells exceeds the table of positions, {config.table} tokens a side; "
                f"set the backbone's option table to {-(-max(grid) // config.patch)} or more."
            )
        self.register_buffer("positions", position_table(config.table, config.width))
        self.layers = nn.ModuleList(
            JointBlock(
                config.width,
                config.heads,
                config.mlp_ratio,
                config.qk_norm,
                last=index == config.depth - 1,
                dual=index < config.dual,
            )
            for index in range(config.depth)
        )
        self.initialise()

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
        """Add the positions and run the joint blocks.

        Raises:
            DataError: The latent exceeds the table of positions.
        """
        image = image + self._middle(*grid).to(image.dtype)
        keys = key_mask(mask, image.shape[1])
        for index, block in enumerate(self.layers):
            text, image = self.run(block, text, image, vector, keys, None)
            if index in layers:
                hidden[index] = image
        return image

    def blocks(self) -> list[nn.Module]:
        """Return the joint blocks."""
        return list(self.layers)

    def _middle(self, rows: int, columns: int) -> Tensor:
        side = len(self.positions)
        if max(rows, columns) > side:
            raise DataError(
                f"A latent of {rows * self.patch}×{columns * self.patch} cells has more than the {side}×{side} tokens "
                f"of the table of positions; give latents of at most {side * self.patch} cells a side."
            )
        top, left = (side - rows) // 2, (side - columns) // 2
        return self.positions[top : top + rows, left : left + columns].flatten(0, 1)
