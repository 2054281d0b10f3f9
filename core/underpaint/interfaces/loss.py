"""Losses: named terms from the tensors of a training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import attrs
from torch import Tensor, nn

from underpaint.interfaces.adapter import Posterior
from underpaint.interfaces.backbone import Prediction
from underpaint.interfaces.component import Component
from underpaint.interfaces.decoder import Reconstruction
from underpaint.interfaces.encoder import Encoder, Features

__all__ = ["AdversarialLoss", "Loss", "StepSizes", "StepTensors"]


@attrs.frozen(kw_only=True)
class StepSizes:
    """What a loss may need to know of the model before the first step, to build its own layers.

    Attributes:
        image: Height and width of the images in pixels.
        latent_channels: d of the latents.
        grid: Height and width of the latents.
        feature_channels: Channels of each of the tokenizer's feature maps; empty in a diffusion stage.
        hidden_width: Channels of the backbone's hidden states; 0 in a tokenizer stage.
    """

    image: tuple[int, int]
    latent_channels: int
    grid: tuple[int, int]
    feature_channels: tuple[int, ...] = ()
    hidden_width: int = 0


@attrs.define(kw_only=True)
class StepTensors:
    """Everything that a step computed. Fields that a kind of stage does not have are None.

    Attributes:
        step: Index of the optimizer step, from 0.
        inputs: B×3×H×W images in [-1, 1] that the encoder was given; in a diffusion stage, those of the latents.
        images: B×3×H×W images in [-1, 1] that the reconstruction should equal: `inputs`, but under equivariance
            regularisation a resized and rotated view of them.
        labels: B class indices, or None when the data set has no labels.
        encoder: The encoder of the stage itself, for losses that run it on further views.
        features: The encoder's features of `inputs`.
        posterior: The latent posterior.
        latents: B×d×h×w latents drawn from `posterior`.
        reconstruction: The decoded images.
        reference_features: Features by the frozen teacher of the stage.
        reference_posterior: Posterior by the frozen teacher of the stage.
        x0: B×d×h×w standardised latents.
        noise: B×d×h×w standard normal noise.
        t: B noise fractions in [0, 1].
        x_t: B×d×h×w noisy latents.
        target: B×d×h×w velocity, noise − x0.
        prediction: The backbone's output.
        companion_target: B×C velocity of the companion, where the backbone has one.
    """

    step: int
    inputs: Tensor | None = None
    images: Tensor | None = None
    labels: Tensor | None = None
    encoder: Encoder | None = None
    features: Features | None = None
    posterior: Posterior | None = None
    latents: Tensor | None = None
    reconstruction: Reconstruction | None = None
    reference_features: Features | None = None
    reference_posterior: Posterior | None = None
    x0: Tensor | None = None
    noise: Tensor | None = None
    t: Tensor | None = None
    x_t: Tensor | None = None
    target: Tensor | None = None
    prediction: Prediction | None = None
    companion_target: Tensor | None = None


class Loss(nn.Module, Component, ABC):
    """Step tensors to named scalar terms.

    Weights, start and end steps belong to the stage config, not to the loss: a loss returns its terms
    unweighted. Every term is a mean over the batch.

    Attributes:
        needs: Fields of `StepTensors` it reads; a stage that cannot give them is refused before training.
        trains: Whether parameters of the loss learn with the model, as a projection head does. They are optimised as
            the part ``losses`` of the stage and saved in its checkpoints, never exported. A loss that does not train
            is frozen.
        layers: Blocks of the backbone whose hidden states it reads, counted from 0.
        held: Frozen networks that it computes with and keeps outside of its modules, such as the encoder of a critic.
            A training goes on only with the same: checkpoints record the hash of all frozen weights of a loss.
    """

    needs: ClassVar[frozenset[str]]
    trains: ClassVar[bool] = False
    layers: tuple[int, ...] = ()
    held: tuple[nn.Module, ...] = ()

    def prepare(self, sizes: StepSizes) -> None:
        """Build what depends on the model; called once, before the first step and before weights are loaded.

        Raises:
            ConfigError: The loss does not fit the model.
        """

    def units(self) -> Sequence[nn.Module]:
        """Return what is worth compiling where a recipe asks for it; what the loss holds, unless it says otherwise.

        Each module is called as a whole, or is the loss itself, and none is differentiated twice.
        """
        return self.held

    @abstractmethod
    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return named scalars to be weighted, summed and minimised."""


class AdversarialLoss(Loss):
    """A loss that owns a critic, which an engine of its own trains.

    In the step of the model `forward` gives the model's terms; gradients reach the reconstruction, not the critic. Then
    `criticise` gives the critic's terms for the same images, the reconstruction detached.

    Attributes:
        critic: Module whose parameters the critic's engine trains: those that require gradients. Everything that the
            critic keeps from step to step belongs into it; frozen feature extractors may stand outside of it.
    """

    critic: nn.Module

    @abstractmethod
    def criticise(self, step: StepTensors) -> dict[str, Tensor]:
        """Return named scalars to be summed and minimised by the critic."""
