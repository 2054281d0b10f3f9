"""What the engine trains for diffusion, and the noise of each step."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor, nn

from underpaint.config.diffusion import PathName, Predicts
from underpaint.config.schema import DiffusionConfig
from underpaint.data.order import sample_seed
from underpaint.diffusion.paths import PATHS
from underpaint.diffusion.times import sample_time
from underpaint.interfaces.backbone import Backbone
from underpaint.interfaces.conditioner import Conditioner
from underpaint.interfaces.loss import StepSizes, StepTensors
from underpaint.training.terms import WeightedLosses

__all__ = ["DiffusionModule", "StepNoise", "diffusion_losses"]


class StepNoise:
    """Noise, times and dropped conditions of a step, the same for any number of ranks.

    They are drawn for the global batch from a generator keyed by seed and step, and each rank takes its rows:
    a few milliseconds of a large batch, for runs that do not depend on how many devices they use.
    """

    def __init__(self, config: DiffusionConfig, shape: tuple[int, int, int], seed: int, device: torch.device) -> None:
        self._config = config
        self._shape = shape
        self._seed = seed
        self._device = device
        self._step = -1
        self._drawn: tuple[Tensor, Tensor, Tensor] | None = None

    def rows(self, step: int, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return noise (B×d×h×w), t (B) and drop (B, bool) of some rows of a step's global batch."""
        if step != self._step or self._drawn is None:
            batch = self._config.batch
            generator = torch.Generator(self._device).manual_seed(sample_seed(self._seed, step))
            noise = torch.randn((batch, *self._shape), generator=generator, device=self._device)
            t = sample_time(self._config.time, batch, generator, self._device, step=step, shape=self._shape)
            drop = torch.rand(batch, generator=generator, device=self._device) < self._config.dropout
            self._step, self._drawn = step, (noise, t, drop)
        noise, t, drop = self._drawn
        return noise[rows], t[rows], drop[rows]


def diffusion_losses(config: DiffusionConfig, device: torch.device, sizes: StepSizes) -> WeightedLosses:
    """Make the losses of diffusion training.

    Raises:
        ConfigError: One of them needs what diffusion training does not have.
    """
    available = frozenset({"step", "x0", "noise", "t", "x_t", "target", "prediction"})
    return WeightedLosses(config.losses, available=available, sizes=sizes, device=device, path="diffusion.losses")


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
        self, x0: Tensor, inputs: Tensor | Sequence[str], noise: Tensor, t: Tensor, drop: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss and its terms for B×d×h×w standardised latents.

        The target is that of the training path, and the backbone's output is compared with it as it comes. Beside the
        terms of the losses there is ``loss_t/0.05`` and so on, the mean squared error at times from 0.0 to 0.1 and so
        on: as sum and count, because a step may have no such time.
        """
        (losses,) = self._outside
        dtype = next(self.backbone.parameters()).dtype
        x_t = self._path.mix(x0, noise, t)
        condition = self.conditioner(inputs, drop)
        prediction = self.backbone(x_t.to(dtype), t, condition, losses.layers)
        prediction = attrs.evolve(prediction, velocity=prediction.velocity.float())
        tensors = StepTensors(
            step=step,
            x0=x0,
            noise=noise,
            t=t,
            x_t=x_t,
            target=self._path.quantity(self._predicts, x0, noise, t),
            prediction=prediction,
        )
        total, terms = losses(tensors)
        assert tensors.target is not None
        return total, terms | _by_time(prediction.velocity.detach(), tensors.target, t)


def _by_time(output: Tensor, target: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Return sum and count of the samples' mean squared errors in tenths of the time; does not wait for the device."""
    errors = (output - target).square().flatten(1).mean(1)
    tenths = torch.arange(10, device=t.device)
    member = (t * 10).long().clamp(max=9)[:, None] == tenths
    # Not a product: an error that is not finite would spoil the other tenths.
    sums = torch.where(member, errors[:, None], 0.0).sum(0)
    pairs = torch.stack([sums, member.sum(0).to(sums.dtype)], dim=1)
    return {f"loss_t/{(i + 0.5) / 10:.2f}": pair for i, pair in enumerate(pairs)}
