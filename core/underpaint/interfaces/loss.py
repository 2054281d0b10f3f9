"""Losses: named terms from the tensors of a training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import attrs
from torch import Tensor, nn

from underpaint.interfaces.adapter import Posterior
from underpaint.interfaces.backbone import Prediction
from underpaint.interfaces.component import Component
from underpaint.interfaces.decoder import Reconstruction
from underpaint.interfaces.encoder import Features

__all__ = ["Loss", "StepTensors"]


@attrs.define(kw_only=True)
class StepTensors:
    """Everything that a step computed. Fields that a kind of stage does not have are None.

    Attributes:
        step: Index of the optimizer step, from 0.
        images: B×3×H×W originals in [-1, 1].
        features: The encoder's features of `images`.
        posterior: The latent posterior.
        reconstruction: The decoded images.
        reference_features: Features by the frozen teacher of the stage.
        reference_posterior: Posterior by the frozen teacher of the stage.
        x0: B×d×h×w standardised latents.
        noise: B×d×h×w standard normal noise.
        t: B noise fractions in [0, 1].
        x_t: B×d×h×w noisy latents.
        target: B×d×h×w velocity, noise − x0.
        prediction: The backbone's output.
    """

    step: int
    images: Tensor | None = None
    features: Features | None = None
    posterior: Posterior | None = None
    reconstruction: Reconstruction | None = None
    reference_features: Features | None = None
    reference_posterior: Posterior | None = None
    x0: Tensor | None = None
    noise: Tensor | None = None
    t: Tensor | None = None
    x_t: Tensor | None = None
    target: Tensor | None = None
    prediction: Prediction | None = None


class Loss(nn.Module, Component, ABC):
    """Step tensors to named scalar terms.

    Weights, start and end steps belong to the stage config, not to the loss: a loss returns its terms
    unweighted. Every term is a mean over the batch.

    Attributes:
        needs: Fields of `StepTensors` it reads; a stage that cannot give them is refused before training.
    """

    needs: ClassVar[frozenset[str]]

    @abstractmethod
    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return named scalars to be weighted, summed and minimised."""
