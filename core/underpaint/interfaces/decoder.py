"""Decoders: latents to images."""

from __future__ import annotations

from abc import ABC, abstractmethod

import attrs
from torch import Tensor, nn

from underpaint.interfaces.component import Component

__all__ = ["Decoder", "Reconstruction"]


# Not frozen: torch.compile cannot trace how a frozen class is made.
@attrs.define(eq=False)
class Reconstruction:
    """A decoded batch.

    Attributes:
        image: B×3×H×W, nominally in [-1, 1] but not clamped.
        pyramid: Coarser B×3×h×w images, ascending in size; empty for single-scale decoders.
    """

    image: Tensor
    pyramid: tuple[Tensor, ...] = ()


class Decoder(nn.Module, Component, ABC):
    """Latents to `Reconstruction`.

    Made with the context keywords ``latent_channels`` and ``stride`` (pixels one latent cell becomes,
    per side).
    """

    @abstractmethod
    def forward(self, latents: Tensor) -> Reconstruction:
        """Decode B×d×h×w latents to images of h·stride × w·stride pixels."""

    def last_layer(self) -> nn.Parameter | None:
        """Return the weight where gradient ratios are measured, or None when there is none."""
        return None
