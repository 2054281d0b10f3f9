"""Adapters: features to a latent posterior."""

from __future__ import annotations

from abc import ABC, abstractmethod

import attrs
import torch
from torch import Tensor, nn

from underpaint.interfaces.component import Component
from underpaint.interfaces.encoder import Features

__all__ = ["Adapter", "Posterior"]


# Not frozen: torch.compile cannot trace how a frozen class is made.
@attrs.define(eq=False)
class Posterior:
    """A diagonal Gaussian over latents, or a point when `logvar` is None.

    Attributes:
        mean: B×d×h×w.
        logvar: Logarithm of the variance, B×d×h×w, or None for a deterministic latent.
    """

    mean: Tensor
    logvar: Tensor | None = None

    def mode(self) -> Tensor:
        """Return the most likely latent, B×d×h×w."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw a latent, B×d×h×w; the mean itself when the posterior is a point."""
        if self.logvar is None:
            return self.mean
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """Return KL(posterior ‖ N(0, I)) summed over each sample, in nats, shape B.

        Closed form for diagonal Gaussians: ½ Σ (μ² + σ² − 1 − log σ²). Zero for a point posterior,
        which has no density to compare.
        """
        if self.logvar is None:
            return self.mean.new_zeros(self.mean.shape[0])
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)


class Adapter(nn.Module, Component, ABC):
    """`Features` to `Posterior`.

    Made with the context keywords ``in_channels`` (channels of each map) and ``latent_channels``.

    Attributes:
        latent_channels: d of the posterior.
        stride: Cells of the deepest map that one latent cell covers, per side; 1 keeps the grid.
    """

    latent_channels: int
    stride: int = 1

    @abstractmethod
    def forward(self, features: Features) -> Posterior:
        """Return the posterior of B×d×h×w latents."""

    def last_layer(self) -> nn.Parameter | None:
        """Return the weight where gradient ratios are measured, or None when there is none."""
        return None
