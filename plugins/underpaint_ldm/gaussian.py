"""The adapter of a KL-regularised autoencoder: features to mean and variance (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from underpaint import Adapter, DataError, Features, Posterior
from underpaint_ldm.config import GaussianConfig

__all__ = ["Gaussian"]

_LOGVAR = (-30.0, 20.0)
"""Limits of the log-variance in the code of LDM and VA-VAE."""


class Gaussian(Adapter):
    """A 3×3 convolution to 2·d channels and a 1×1 one among them: d of the mean, d of the log-variance.

    Several maps are joined along their channels, so they must be of one grid.
    """

    stride = 1

    def __init__(self, config: GaussianConfig, *, in_channels: Sequence[int], latent_channels: int) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        moments = 2 * latent_channels
        self.conv_out = nn.Conv2d(sum(in_channels), moments, 3, padding=1)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.quant_conv else nn.Identity()

    def forward(self, features: Features) -> Posterior:
        """Return the posterior, B×d×h×w, of maps of B×C_i×h×w.

        Raises:
            DataError: The maps are of different grids.
        """
        grids = [tuple(m.shape[-2:]) for m in features.maps]
        if len(set(grids)) > 1:
            raise DataError(
                f"The adapter 'ldm/gaussian' joins maps of one grid, and the encoder gives "
                f"{', '.join(f'{h}×{w}' for h, w in grids)}; ask the encoder for layers of one resolution."
            )
        joined = torch.cat(features.maps, dim=1).to(self.conv_out.weight.dtype)
        mean, logvar = self.quant_conv(self.conv_out(joined)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*_LOGVAR))

    def last_layer(self) -> nn.Parameter:
        """Return the weight of the 3×3 convolution, where VA-VAE measures gradient ratios."""
        weight = self.conv_out.weight
        assert isinstance(weight, nn.Parameter)
        return weight
