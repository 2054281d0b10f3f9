"""The backbone."""

from __future__ import annotations

from collections.abc import Collection

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from underpaint import Backbone, Condition, ConfigError, DataError, Prediction
from underpaint_sit.block import Block, modulate
from underpaint_sit.config import SiTConfig
from underpaint_sit.positions import grid_positions, time_sinusoids

__all__ = ["SiT"]

_TIMES = 256


class SiT(Backbone):
    """A transformer over patches of the noisy latent, conditioned on time and a pooled vector.

    It differs from the published SiT in two signs only: it is given our t (0 data, 1 noise), which is 1 − SiT's
    time, and predicts ε − x0, which is minus SiT's velocity. t enters the sinusoids as it is, in [0, 1], as in SiT,
    LightningDiT and REPA (DiT, SD3 and FLUX multiply by 1000): the embedding then varies smoothly over a trajectory.
    REPA's and REG's networks have our t and sign. The label table is the conditioner's, and the variance output that
    SiT keeps from DiT is left out.

    Grids other than the one it was made for are accepted when the patch divides them; positions count from the
    upper left corner.

    Raises:
        ConfigError: The patch does not divide the grid, or the condition has tokens only.
    """

    def __init__(
        self, config: SiTConfig, *, latent_channels: int, grid: tuple[int, int], pooled_dim: int, token_dim: int
    ) -> None:
        super().__init__()
        if token_dim and not pooled_dim:
            raise ConfigError(
                "This backbone reads a pooled condition, and the conditioner gives tokens only; "
                "choose a conditioner with a pooled output, such as 'labels'."
            )
        if grid[0] % config.patch or grid[1] % config.patch:
            raise ConfigError(
                f"A latent of {grid[0]}×{grid[1]} cells does not divide into patches of {config.patch}×{config.patch}; "
                "choose one of a smaller patch, such as 'sit/S-1'."
            )
        width = config.width
        self.width = width
        self.patch = config.patch
        self.latent_channels = latent_channels
        self._recompute = config.recompute
        self._positions: dict[tuple[int, int], Tensor] = {}
        cells = config.patch**2 * latent_channels
        self.embed = nn.Linear(cells, width)
        self.time = nn.Sequential(nn.Linear(_TIMES, width), nn.SiLU(), nn.Linear(width, width))
        self.project = nn.Identity() if pooled_dim in (0, width) else nn.Linear(pooled_dim, width)
        self._pooled = pooled_dim > 0
        self.layers = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio, config.qk_norm, config.qk_norm_type)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, config.outputs * cells)
        self._initialise()

    def _initialise(self) -> None:
        # DiT: Xavier for matrices, small normal for the time MLP, zero for what modulates and for the head, so that
        # every block begins as the identity and the first prediction is zero.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
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
        self._check(x_t, condition, layers)
        vector = self._vector(t, condition)
        x, hidden = self._run(self._tokens(x_t), vector, layers)
        return Prediction(self._read(self._final(x, vector), x_t), hidden)

    def blocks(self) -> list[nn.Module]:
        """Return the transformer blocks."""
        return list(self.layers)

    def _tokens(self, x_t: Tensor) -> Tensor:
        rows, columns = x_t.shape[2] // self.patch, x_t.shape[3] // self.patch
        x: Tensor = self.embed(_patches(x_t.to(self.embed.weight.dtype), self.patch))
        return x + self._position(rows, columns, x)

    def _vector(self, t: Tensor, condition: Condition) -> Tensor:
        dtype = self.embed.weight.dtype
        vector: Tensor = self.time(time_sinusoids(t, _TIMES).to(dtype))
        if condition.pooled is not None:
            vector = vector + self.project(condition.pooled.to(dtype))
        return F.silu(vector)

    def _run(self, x: Tensor, vector: Tensor, layers: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
        hidden = {}
        for index, block in enumerate(self.layers):
            if self._recompute and self.training:
                x = checkpoint(block, x, vector, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, vector)
            if index in layers:
                hidden[index] = x
        return x, hidden

    def _final(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale = self.modulation(vector).chunk(2, dim=1)
        return modulate(self.norm(x), shift, scale)

    def _read(self, x: Tensor, x_t: Tensor) -> Tensor:
        rows, columns = x_t.shape[2] // self.patch, x_t.shape[3] // self.patch
        return _image(self.head(x), rows, columns, self.patch).to(x_t.dtype)

    def _position(self, rows: int, columns: int, like: Tensor) -> Tensor:
        # A plain attribute, not a buffer: casting the module to bf16 must not round the positions for good.
        known = self._positions.get((rows, columns))
        if known is None or known.device != like.device or known.dtype != like.dtype:
            known = grid_positions(rows, columns, self.width, like.device).to(like.dtype)
            self._positions[rows, columns] = known
        return known

    def _check(self, x_t: Tensor, condition: Condition, layers: Collection[int]) -> None:
        rows, columns = x_t.shape[2:]
        if rows % self.patch or columns % self.patch:
            raise DataError(
                f"A latent of {rows}×{columns} cells does not divide into patches of {self.patch}×{self.patch}; "
                f"give sides that are multiples of {self.patch}."
            )
        if (condition.pooled is not None) != self._pooled:
            made, given = ("with", "without") if self._pooled else ("without", "with")
            raise DataError(
                f"This backbone was made {made} a pooled condition and was given one {given} it; "
                "use the conditioner that it was made for."
            )
        for layer in layers:
            if not 0 <= layer < len(self.layers):
                raise DataError(
                    f"Layer {layer} was asked for, and the backbone has {len(self.layers)} blocks; "
                    f"layers are 0 to {len(self.layers) - 1}."
                )


# A patch is read channel by channel and written cell by cell, as DiT does, so that published weights fit.


def _patches(x: Tensor, patch: int) -> Tensor:
    b, d, h, w = x.shape
    x = x.reshape(b, d, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, (h // patch) * (w // patch), d * patch**2)


def _image(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    b = tokens.shape[0]
    x = tokens.reshape(b, rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(b, -1, rows * patch, columns * patch)
