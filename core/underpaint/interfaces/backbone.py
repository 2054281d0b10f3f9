"""Backbones: the networks that predict the velocity of the flow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

import attrs
from torch import Tensor, nn

from underpaint.interfaces.component import Component
from underpaint.interfaces.conditioner import Condition

__all__ = ["Backbone", "Prediction"]


# Not frozen: torch.compile cannot trace how a frozen class is made.
@attrs.define(eq=False)
class Prediction:
    """What a backbone says about a noisy latent.

    Attributes:
        velocity: B×d×h×w, in the direction from data to noise (ε − x0).
        hidden: B×N×C hidden states after each layer asked for, by layer index; B×(1 + N)×C where a companion was given,
            whose token comes first.
        companion: B×C velocity of the companion, ε − c0; None where none was given.
        variance: B×d×h×w fractions f of log σ² = f·log β + (1 − f)·log β̃, the variance of a DDPM's step between its
            bounds (Nichol & Dhariwal 2021, eq. 15); None where the backbone has learned none.
    """

    velocity: Tensor
    hidden: Mapping[int, Tensor] = attrs.field(factory=dict)
    companion: Tensor | None = None
    variance: Tensor | None = None


class Backbone(nn.Module, Component, ABC):
    """(x_t, t, `Condition`) to `Prediction`.

    Made with the context keywords ``latent_channels``, ``grid`` (height and width of the latent it is
    made for; others may be accepted), ``pooled_dim`` and ``token_dim`` of the condition (0 where absent).
    A pooled condition as wide as `width` is added to the time embedding as it comes; another width
    is projected by the backbone.

    Its config class has an attribute ``width``.

    A backbone may denoise one vector of the image together with the latent, its companion, as REG does. It then sets
    `companion` to the vector's channels, and its `forward` has a fifth argument ``companion``: B×C noisy vectors at the
    same t. Backbones without one are never given it.

    Attributes:
        width: Channels of the hidden states.
        patch: Latent cells of one token, per side.
        companion: Channels of the companion; 0 for none.
        variance: Whether it gives `Prediction.variance`. Not beside a companion.
    """

    width: int
    patch: int
    companion: int = 0
    variance: bool = False

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, layers: Collection[int] = ()) -> Prediction:
        """Predict the velocity.

        Args:
            x_t: B×d×h×w noisy latents, (1 − t)·x0 + t·ε.
            t: Noise fraction in [0, 1], shape B; 0 is data, 1 is noise.
            condition: Condition of each sample.
            layers: Blocks whose hidden states are wanted, counted from 0.
        """

    def blocks(self) -> list[nn.Module]:
        """Return the repeated blocks, in order: the units of compilation and recomputation."""
        return []
