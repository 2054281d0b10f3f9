"""The adapter: a per-token MLP from features to latents (AlignTok)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from underpaint import Adapter, DataError, Features, Posterior
from underpaint_aligntok.config import MlpConfig

__all__ = ["Mlp"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}


_LOGVAR = (-30.0, 20.0)
"""Limits of the log-variance, as autoencoders of latent diffusion have them."""


class Mlp(Adapter):
    """Linear, activation, linear, at every cell of the feature grid; no normalisation.

    The latent is deterministic, unless `gaussian` is set: then the second layer gives d means and d log-variances.
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
        self.gaussian = config.gaussian
        self.outer = nn.Linear(hidden, 2 * latent_channels if config.gaussian else latent_channels)

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
        moments: Tensor = self.outer(self.activation(self.inner(tokens.to(self.inner.weight.dtype))))
        moments = moments.permute(0, 3, 1, 2).contiguous()
        if not self.gaussian:
            return Posterior(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*_LOGVAR))

    def last_layer(self) -> nn.Parameter:
        """Return the weight of the second layer, d×hidden, or 2·d×hidden of a Gaussian."""
        weight = self.outer.weight
        assert isinstance(weight, nn.Parameter)
        return weight
