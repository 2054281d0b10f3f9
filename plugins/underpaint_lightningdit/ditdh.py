"""DiT^DH."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from underpaint import Backbone, Condition, Prediction
from underpaint_lightningdit.block import Block, ModulatedNorm
from underpaint_lightningdit.config import DiTDHConfig
from underpaint_lightningdit.positions import Tables, grid_positions, grid_rotations
from underpaint_lightningdit.tokens import check_context, check_given, image, patches, run_block

__all__ = ["DiTDH", "FourierTimes"]

_TIMES = 256


class FourierTimes(nn.Module):
    """[cos, sin] of 2π·t·frequency, with frequencies drawn once from a standard normal distribution.

    Gaussian Fourier features (Tancik et al. 2020), as RAE embeds its time. The frequencies are part of the saved state
    and are not trained.
    """

    frequencies: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(count))

    def forward(self, t: Tensor) -> Tensor:
        """Return B×(2·count) of B times, float32 or wider."""
        angles = torch.outer(t.to(torch.promote_types(t.dtype, torch.float32)), 2.0 * math.pi * self.frequencies)
        return torch.cat((angles.cos(), angles.sin()), dim=1)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        # A cast of the model to bf16 would round the frequencies, and so change what a time means.
        exact = self.frequencies
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not exact.is_meta:
            self.frequencies = exact.to(self.frequencies.device)
        return self


class DiTDH(Backbone):
    """A transformer that gives each token a condition, and a shallow wide head that predicts the velocity from it.

    Zheng et al. 2025 (RAE): latents of many channels need a width of at least as many, and only the head has to be that
    wide. One token is one cell of the latent. RAE's t and velocity are ours: 0 is data, and the velocity is ε − x0.
    The label table is the conditioner's. Grids other than the one it was made for are accepted; positions count from
    the upper left corner.

    Raises:
        ConfigError: The condition has tokens only.
    """

    def __init__(
        self, config: DiTDHConfig, *, latent_channels: int, grid: tuple[int, int], pooled_dim: int, token_dim: int
    ) -> None:
        super().__init__()
        check_context("ditdh", 1, grid, pooled_dim, token_dim)
        width, wide = config.width, config.head_width
        self.width = width
        self.patch = 1
        self._recompute = config.recompute
        self._pooled = pooled_dim > 0
        # Hidden states are as wide as the backbone says it is: those of a wider head cannot be asked for.
        self._states = config.depth + (config.head_depth if wide == width else 0)
        self._positions = Tables(partial(grid_positions, width=width))
        self._rotations = Tables(partial(grid_rotations, channels=width // config.heads))
        self._head_rotations = Tables(partial(grid_rotations, channels=wide // config.head_heads))
        self.times = FourierTimes(_TIMES)
        self.time = nn.Sequential(nn.Linear(2 * _TIMES, width), nn.SiLU(), nn.Linear(width, width))
        self.project = nn.Identity() if pooled_dim in (0, width) else nn.Linear(pooled_dim, width)
        self.embed = nn.Linear(latent_channels, width)
        self.layers = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio, qk_norm=config.qk_norm) for _ in range(config.depth)
        )
        self.widen = nn.Identity() if wide == width else nn.Linear(width, wide)
        self.head_embed = nn.Linear(latent_channels, wide)
        self.head_layers = nn.ModuleList(
            Block(wide, config.head_heads, config.mlp_ratio, qk_norm=config.qk_norm) for _ in range(config.head_depth)
        )
        self.norm = ModulatedNorm(wide)
        self.modulation = nn.Linear(wide, 2 * wide)
        self.head = nn.Linear(wide, latent_channels)
        self._initialise()

    def _initialise(self) -> None:
        # As RAE: torch's own initialisation for matrices (not DiT's Xavier), which the blocks have already, and zero
        # for what modulates and for the head.
        for embedding in (self.embed, self.head_embed):
            nn.init.xavier_uniform_(embedding.weight)
            nn.init.zeros_(embedding.bias)
        for module in self.time:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        blocks = (b for b in self.blocks() if isinstance(b, Block))
        for zero in (self.head, self.modulation, *(b.modulation for b in blocks)):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, layers: Collection[int] = ()) -> Prediction:
        """Predict the velocity, in the type of `x_t`; hidden states are B×N×width, row by row.

        Raises:
            DataError: The condition is not the one it was made for, or a layer is asked for that it does not have,
                such as one of the head where that is wider.
        """
        check_given(x_t, 1, condition, self._pooled, layers, self._states)
        dtype = self.embed.weight.dtype
        rows, columns = x_t.shape[2:]
        cells = patches(x_t.to(dtype), 1)
        x = self.embed(cells)
        x = x + self._positions(rows, columns, x.device, x.dtype)
        exact = torch.promote_types(x.dtype, torch.float32)
        rotation = self._rotations(rows, columns, x.device, exact)
        time = self.time(self.times(t).to(dtype)).unsqueeze(1)
        vector = time
        if condition.pooled is not None:
            vector = vector + self.project(condition.pooled.to(dtype)).unsqueeze(1)
        # RAE passes the sum of time and label through SiLU, and every block does so again; likewise below.
        vector = F.silu(F.silu(vector))
        hidden = {}
        recompute = self._recompute and self.training
        for index, block in enumerate(self.layers):
            x = run_block(block, recompute, x, vector, rotation)
            if index in layers:
                hidden[index] = x
        each = F.silu(self.widen(F.silu(time + x)))
        rotation = self._head_rotations(rows, columns, x.device, exact)
        h = self.head_embed(cells)
        for index, block in enumerate(self.head_layers, start=len(self.layers)):
            h = run_block(block, recompute, h, each, rotation)
            if index in layers:
                hidden[index] = h
        shift, scale = self.modulation(each).chunk(2, dim=-1)
        out = self.head(self.norm(h, scale, shift)[0])
        return Prediction(image(out, rows, columns, 1).to(x_t.dtype), hidden)

    def blocks(self) -> list[nn.Module]:
        """Return the transformer blocks, the head's last."""
        return [*self.layers, *self.head_layers]
