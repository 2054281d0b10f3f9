"""LightningDiT."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from underpaint import Backbone, Condition, Prediction
from underpaint_lightningdit.block import Block, ModulatedNorm
from underpaint_lightningdit.config import LightningDiTConfig
from underpaint_lightningdit.positions import Tables, grid_positions, grid_rotations, time_sinusoids
from underpaint_lightningdit.tokens import check_context, check_given, image, patches, run_block

__all__ = ["LightningDiT"]

_TIMES = 256


class LightningDiT(Backbone):
    """A transformer over patches of the noisy latent, conditioned on time and a pooled vector.

    DiT with RMS normalisation, SwiGLU and 2-D rotary positions beside the fixed ones (Yao et al. 2025). The published
    model runs the other way: it is given 1 − t and predicts x0 − ε. Here t is the noise fraction and enters the
    sinusoids as it is, in [0, 1], and the velocity is ε − x0; the importer converts published weights. The label table
    is the conditioner's.

    Grids other than the one it was made for are accepted when the patch divides them; positions count from the
    upper left corner.

    Raises:
        ConfigError: The patch does not divide the grid, or the condition has tokens only.
    """

    def __init__(
        self,
        config: LightningDiTConfig,
        *,
        latent_channels: int,
        grid: tuple[int, int],
        pooled_dim: int,
        token_dim: int,
    ) -> None:
        super().__init__()
        check_context("lightningdit", config.patch, grid, pooled_dim, token_dim)
        width = config.width
        self.width = width
        self.patch = config.patch
        self._recompute = config.recompute
        self._pooled = pooled_dim > 0
        self._positions = Tables(partial(grid_positions, width=width))
        self._rotations = Tables(partial(grid_rotations, channels=width // config.heads))
        cells = config.patch**2 * latent_channels
        self.embed = nn.Linear(cells, width)
        self.time = nn.Sequential(nn.Linear(_TIMES, width), nn.SiLU(), nn.Linear(width, width))
        self.project = nn.Identity() if pooled_dim in (0, width) else nn.Linear(pooled_dim, width)
        self.layers = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio, qk_norm=config.qk_norm, shift=config.shift)
            for _ in range(config.depth)
        )
        self.norm = ModulatedNorm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, cells)
        self._initialise()

    def _initialise(self) -> None:
        # As DiT: Xavier for matrices, small normal for the time MLP, zero for what modulates and for the head, so that
        # every block begins as the identity and the first prediction is zero.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.time:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        for zero in (self.head, self.modulation, *(b.modulation for b in self.layers if isinstance(b, Block))):
            nn.init.zeros_(zero.weight)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, layers: Collection[int] = ()) -> Prediction:
        """Predict the velocity, in the type of `x_t`; hidden states are B×N×width, row by row.

        Raises:
            DataError: The patch does not divide the latent, the condition is not the one it was made for, or a layer
                is asked for that it does not have.
        """
        check_given(x_t, self.patch, condition, self._pooled, layers, len(self.layers))
        dtype = self.embed.weight.dtype
        rows, columns = x_t.shape[2] // self.patch, x_t.shape[3] // self.patch
        x = self.embed(patches(x_t.to(dtype), self.patch))
        x = x + self._positions(rows, columns, x.device, x.dtype)
        rotation = self._rotations(rows, columns, x.device, torch.promote_types(x.dtype, torch.float32))
        vector = self.time(time_sinusoids(t, _TIMES).to(dtype))
        if condition.pooled is not None:
            vector = vector + self.project(condition.pooled.to(dtype))
        vector = F.silu(vector).unsqueeze(1)
        hidden = {}
        for index, block in enumerate(self.layers):
            x = run_block(block, self._recompute and self.training, x, vector, rotation)
            if index in layers:
                hidden[index] = x
        shift, scale = self.modulation(vector).chunk(2, dim=-1)
        out = self.head(self.norm(x, scale, shift)[0])
        return Prediction(image(out, rows, columns, self.patch).to(x_t.dtype), hidden)

    def blocks(self) -> list[nn.Module]:
        """Return the transformer blocks."""
        return list(self.layers)
