"""The adapter: a per-token MLP from features to latents (AlignTok)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from underpaint import Adapter, DataError, Features, Posterior
from underpaint_aligntok.config import MlpConfig

__all__ = ["Mlp"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}


class Mlp(Adapter):
    """Linear, activation, linear, at every cell of the feature grid; no normalisation, a deterministic latent.

    Several maps are joined along their channels, so they must be of one grid.
    """

    stride = 1

    def __init__(self, config: MlpConfig, *, in_channels: Sequence[int], latent_channels: int) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        width = sum(in_channels)
        hidden = width if config.hidden is None else config.hidden
        self.inner = nn.Linear(width, hidden)
        self.activation = _ACTIVATIONS[config.activation]()
        self.outer = nn.Linear(hidden, latent_channels)

    def forward(self, features: Features) -> Posterior:
        """Return the latents, B×d×h×w, of maps of B×C_i×h×w.

        Raises:
            DataError: The maps are of different grids.
        """
        grids = [tuple(m.shape[-2:]) for m in features.maps]
        if len(set(grids)) > 1:
            raise DataError(
                f"The adapter 'aligntok/mlp' joins maps of one grid, and the encoder gives "
                f"{', '.join(f'{h}×{w}' for h, w in grids)}; ask the encoder for layers of one resolution."
            )
        tokens = torch.cat(features.maps, dim=1).permute(0, 2, 3, 1)
        latents: Tensor = self.outer(self.activation(self.inner(tokens.to(self.inner.weight.dtype))))
        return Posterior(latents.permute(0, 3, 1, 2).contiguous())

    def last_layer(self) -> nn.Parameter:
        """Return the weight of the second layer, d×hidden."""
        return self.outer.weight
