"""The adapter: features of several layers to one Gaussian latent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from underpaint import Adapter as AdapterInterface
from underpaint import DataError, Features, Posterior
from underpaint_vfmvae.config import AdapterConfig
from underpaint_vfmvae.projection import AttentionProjection

__all__ = ["Adapter"]

_LOGVAR = (-30.0, 20.0)


class Adapter(AdapterInterface):
    """Maps of one grid, from any number of layers, to the posterior of VFM-VAE.

    Each map goes through an attention projection of its own and is rearranged so that one cell holds a square of
    stride × stride of its cells. Joined along the channels, a final projection makes mean and log-variance of them; the
    latter is kept within [-30, 20]. `Posterior.mode` is the mean; the authors always sample.

    Raises:
        ConfigError: The widths of a projection do not divide.
    """

    def __init__(self, config: AdapterConfig, *, in_channels: Sequence[int], latent_channels: int) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.stride = config.stride
        self.maps = nn.ModuleList(AttentionProjection(channels, config.width) for channels in in_channels)
        joined = len(self.maps) * config.width * config.stride**2
        self.final = AttentionProjection(joined, 2 * latent_channels)

    def forward(self, features: Features) -> Posterior:
        """Return the posterior of B×d×(h/stride)×(w/stride) latents, of maps of B×C_i×h×w.

        Raises:
            DataError: The maps are of different grids, or do not divide by the stride.
        """
        grids = [tuple(m.shape[-2:]) for m in features.maps]
        if len(set(grids)) > 1:
            raise DataError(
                f"The adapter 'vfmvae/adapter' joins maps of one grid, and the encoder gives "
                f"{', '.join(f'{h}×{w}' for h, w in grids)}; ask the encoder for layers of one resolution."
            )
        rows, columns = grids[0]
        if rows % self.stride or columns % self.stride:
            raise DataError(
                f"The adapter 'vfmvae/adapter' merges {self.stride}×{self.stride} cells, and the encoder gives maps of "
                f"{rows}×{columns}; use images whose maps divide, or another option 'stride'."
            )
        dtype = self.final.skip.weight.dtype
        merged = [
            F.pixel_unshuffle(_map(project(_tokens(given.to(dtype))), rows, columns), self.stride)
            for project, given in zip(self.maps, features.maps, strict=True)
        ]
        moments = self.final(_tokens(torch.cat(merged, dim=1)))
        mean, logvar = _map(moments, rows // self.stride, columns // self.stride).chunk(2, dim=1)
        return Posterior(mean.contiguous(), logvar.clamp(*_LOGVAR))

    def last_layer(self) -> nn.Parameter:
        """Return the output matrix of the gated MLP of the final projection."""
        weight = self.final.mlp.out.weight
        assert isinstance(weight, nn.Parameter)
        return weight


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _map(tokens: Tensor, rows: int, columns: int) -> Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), -1, rows, columns)
