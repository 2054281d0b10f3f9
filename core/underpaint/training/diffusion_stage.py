"""What the engine trains for diffusion, and the noise of each step."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor, nn

from underpaint.config.diffusion import DiffusionConfig, PathName, Predicts
from underpaint.data.order import sample_seed
from underpaint.diffusion.paths import PATHS
from underpaint.diffusion.times import sample_time
from underpaint.errors import ConfigError
from underpaint.interfaces.backbone import Backbone, Prediction
from underpaint.interfaces.conditioner import Condition, Conditioner
from underpaint.interfaces.encoder import Encoder
from underpaint.interfaces.loss import StepSizes, StepTensors
from underpaint.training.terms import WeightedLosses

__all__ = ["LEARNING", "DiffusionModule", "StepNoise", "check_companion", "check_losses", "diffusion_losses"]

LEARNING = ("backbone", "conditioner", "losses")
"""What a diffusion model trains, by the names that its optimizer's settings know."""


class StepNoise:
    """Noise, times and dropped conditions of a step, the same for any number of ranks.

    They are drawn for the global batch from a generator keyed by seed and step, and each rank takes its rows:
    a few milliseconds of a large batch, for runs that do not depend on how many devices they use.

    Args:
        config: Batch, times, dropout.
        shape: d, h, w of the latents.
        seed: Seed of the stage.
        device: Where it is drawn.
        companion: Channels of the companion's noise; 0 draws none.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        shape: tuple[int, int, int],
        seed: int,
        device: torch.device,
        companion: int = 0,
    ) -> None:
        self._config = config
        self._shape = shape
        self._seed = seed
        self._device = device
        self._channels = companion
        self._step = -1
        self._drawn: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def rows(self, step: int, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return noise (B×d×h×w), t (B) and drop (B, bool) of some rows of a step's global batch."""
        noise, t, drop, _ = self._draw(step)
        return noise[rows], t[rows], drop[rows]

    def companion(self, step: int, rows: slice) -> Tensor:
        """Return the companion's noise (B×C) of the same rows."""
        return self._draw(step)[3][rows]

    def _draw(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if step != self._step or self._drawn is None:
            batch = self._config.batch
            generator = torch.Generator(self._device).manual_seed(sample_seed(self._seed, step))
            noise = torch.randn((batch, *self._shape), generator=generator, device=self._device)
            t = sample_time(self._config.time, batch, generator, self._device, step=step, shape=self._shape)
            drop = torch.rand(batch, generator=generator, device=self._device) < self._config.dropout
            # After the others, so that these are the same with a companion and without.
            companion = torch.randn((batch, self._channels), generator=generator, device=self._device)
            self._step, self._drawn = step, (noise, t, drop, companion)
        return self._drawn


def diffusion_losses(
    config: DiffusionConfig, device: torch.device, sizes: StepSizes, path: str = "diffusion"
) -> WeightedLosses:
    """Make the losses of diffusion training.

    Args:
        config: The settings.
        device: Where they compute.
        sizes: What the losses' own layers are built for.
        path: Where the settings stand in the recipe, for messages.

    Raises:
        ConfigError: One of them needs what diffusion training does not have, or none of them trains the companion.
    """
    available = {"step", "inputs", "x0", "noise", "t", "x_t", "target", "prediction"}
    if config.companion is not None:
        available.add("companion_target")
    losses = WeightedLosses(
        config.losses, available=frozenset(available), sizes=sizes, device=device, path=f"{path}.losses"
    )
    if config.companion is not None and "companion_target" not in losses.needs:
        raise ConfigError(
            "diffusion.companion is set, and none of diffusion.losses trains the companion; add "
            "{name: companion, weight: 0.03}, or remove diffusion.companion."
        )
    return losses


def check_companion(name: str, backbone: Backbone, encoder: Encoder | None, image: tuple[int, int]) -> None:
    """Refuse a companion that is not the backbone's.

    Args:
        name: Registered name of the backbone.
        backbone: The backbone.
        encoder: Encoder of ``diffusion.companion``, on any device, or None where that is not set.
        image: Height and width of the images in pixels.

    Raises:
        ConfigError: Only one of the two has a companion, or they disagree about its channels.
        DataError: The images do not fit the encoder.
    """
    wanted = backbone.companion
    if encoder is None:
        if wanted:
            raise ConfigError(
                f"The backbone '{name}' denoises a companion vector of {wanted} channels; set diffusion.companion to "
                "the encoder whose pooled features it is."
            )
        return
    if not wanted:
        raise ConfigError(
            f"diffusion.companion is set, and the backbone '{name}' has no companion vector; remove it, or take a "
            "backbone that has one, such as 'reg/XL-1'."
        )
    encoder.grid(*image)
    with torch.no_grad():
        pooled = encoder(torch.zeros(1, 3, *image, device=next(encoder.parameters()).device)).pooled
    if pooled is None or pooled.shape[1] != wanted:
        found = "has no pooled features" if pooled is None else f"has pooled features of {pooled.shape[1]} channels"
        advice = "" if pooled is None else f", or set diffusion.backbone.companion={pooled.shape[1]}"
        raise ConfigError(
            f"diffusion.companion names the encoder '{encoder.spec.name}', which {found}, and the backbone '{name}' "
            f"denoises a companion of {wanted}; choose an encoder that fits{advice}."
        )


def check_losses(losses: WeightedLosses, config: DiffusionConfig, backbone: Backbone, sizes: StepSizes) -> None:
    """Refuse losses that do not fit the backbone, by calling each with what the backbone will give.

    Args:
        losses: On the CPU.
        config: The settings.
        backbone: On any device; it is not called.
        sizes: What the losses were prepared for.

    Raises:
        ConfigError: A loss reads the hidden states of blocks which the backbone does not have, or another output, or is
            not made for the path or the prediction.
        DataError: The grids of two of them do not fit each other.
    """
    name, blocks = config.backbone.name, len(backbone.blocks())
    for item in losses.items:
        for layer in item.loss.layers:
            if blocks and layer >= blocks:
                raise ConfigError(
                    f"The loss '{item.config.name}' reads the hidden states after block {layer}, and the backbone "
                    f"'{name}' has blocks 0 to {blocks - 1}; set the loss's option 'layer' to one of them."
                )
    tensors = _example(config, backbone, sizes, losses.layers)
    with torch.no_grad():
        for item in losses.items:
            item.loss(tensors)


def _example(config: DiffusionConfig, backbone: Backbone, sizes: StepSizes, layers: Sequence[int]) -> StepTensors:
    """Return a step of one sample, with random numbers for the backbone's output."""
    path, companion = PATHS[config.path], backbone.companion
    (height, width), shape = sizes.grid, (1, sizes.latent_channels, *sizes.grid)
    tokens = height * width // backbone.patch**2 + bool(companion)
    x0, noise, t = torch.randn(shape), torch.randn(shape), torch.full((1,), 0.5)
    vectors = (torch.randn(1, companion), torch.randn(1, companion))
    return StepTensors(
        step=0,
        inputs=torch.rand(1, 3, *sizes.image) * 2.0 - 1.0,
        x0=x0,
        noise=noise,
        t=t,
        x_t=path.mix(x0, noise, t),
        target=path.quantity(config.predicts, x0, noise, t),
        prediction=Prediction(
            torch.randn(shape),
            {layer: torch.randn(1, tokens, backbone.width) for layer in layers},
            torch.randn(1, companion) if companion else None,
            torch.rand(shape) if backbone.variance else None,
        ),
        companion_target=path.quantity(config.predicts, *vectors, t) if companion else None,
    )


class DiffusionModule(nn.Module):
    """What the engine trains: backbone, conditioner and the losses' heads, with the loss computed in ``forward``."""

    def __init__(
        self,
        backbone: Backbone,
        conditioner: Conditioner,
        losses: WeightedLosses,
        *,
        path: PathName = "linear",
        predicts: Predicts = "velocity",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.conditioner = conditioner
        self.losses = losses.heads
        self._outside = (losses,)
        self._path = PATHS[path]
        self._predicts = predicts

    def forward(
        self,
        x0: Tensor,
        inputs: Tensor | Sequence[str],
        noise: Tensor,
        t: Tensor,
        drop: Tensor,
        step: int,
        *,
        images: Tensor | None = None,
        companion: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss and its terms.

        Args:
            x0: B×d×h×w standardised latents.
            inputs: B labels or texts, as the conditioner accepts.
            noise: B×d×h×w.
            t: B noise fractions.
            drop: B booleans, True for the null condition.
            step: Optimizer step.
            images: B×3×H×W images of the latents in [-1, 1], where a loss needs them.
            companion: B×C vectors and their noise, where the backbone has a companion.

        The target is that of the training path, and the backbone's output is compared with it as it comes. Beside the
        terms of the losses there is ``loss_t/0.05`` and so on, the mean squared error at times from 0.0 to 0.1 and so
        on: as sum and count, because a step may have no such time.
        """
        (losses,) = self._outside
        tensors = self._tensors(x0, self.conditioner(inputs, drop), noise, t, step, images, companion)
        total, terms = losses(tensors)
        assert tensors.prediction is not None
        assert tensors.target is not None
        return total, terms | _by_time(tensors.prediction.velocity.detach(), tensors.target, t)

    def alignment(
        self, x0: Tensor, inputs: Tensor | Sequence[str], noise: Tensor, t: Tensor, step: int, images: Tensor
    ) -> Tensor | None:
        """Return the sum of the losses that read hidden states, without their weights; None where none counts.

        See `forward` for the arguments. No condition is dropped, and none gets a gradient.
        """
        (losses,) = self._outside
        with torch.no_grad():
            condition = self.conditioner(inputs)
        return losses.alignment(self._tensors(x0, condition, noise, t, step, images, None))

    def _tensors(
        self,
        x0: Tensor,
        condition: Condition,
        noise: Tensor,
        t: Tensor,
        step: int,
        images: Tensor | None,
        companion: tuple[Tensor, Tensor] | None,
    ) -> StepTensors:
        (losses,) = self._outside
        dtype = next(self.backbone.parameters()).dtype
        x_t = self._path.mix(x0, noise, t)
        if companion is None:
            prediction = self.backbone(x_t.to(dtype), t, condition, losses.layers)
            prediction = attrs.evolve(prediction, velocity=prediction.velocity.float())
            companion_target = None
        else:
            c_t = self._path.mix(*companion, t).to(dtype)
            prediction = self.backbone(x_t.to(dtype), t, condition, losses.layers, companion=c_t)
            prediction = attrs.evolve(
                prediction, velocity=prediction.velocity.float(), companion=prediction.companion.float()
            )
            companion_target = self._path.quantity(self._predicts, *companion, t)
        return StepTensors(
            step=step,
            inputs=images,
            x0=x0,
            noise=noise,
            t=t,
            x_t=x_t,
            target=self._path.quantity(self._predicts, x0, noise, t),
            prediction=prediction,
            companion_target=companion_target,
        )


def _by_time(output: Tensor, target: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Return sum and count of the samples' mean squared errors in tenths of the time; does not wait for the device."""
    errors = (output - target).square().flatten(1).mean(1)
    tenths = torch.arange(10, device=t.device)
    member = (t * 10).long().clamp(max=9)[:, None] == tenths
    # Not a product: an error that is not finite would spoil the other tenths.
    sums = torch.where(member, errors[:, None], 0.0).sum(0)
    pairs = torch.stack([sums, member.sum(0).to(sums.dtype)], dim=1)
    return {f"loss_t/{(i + 0.5) / 10:.2f}": pair for i, pair in enumerate(pairs)}
