"""What the engine trains for diffusion, and the noise of each step."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor, nn

from underpaint.config.schema import DiffusionConfig
from underpaint.data.order import sample_seed
from underpaint.diffusion.transport import interpolate, sample_time, velocity_target
from underpaint.interfaces.backbone import Backbone
from underpaint.interfaces.conditioner import Conditioner
from underpaint.interfaces.loss import StepTensors
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
            t = sample_time(self._config.time, batch, generator, self._device)
            drop = torch.rand(batch, generator=generator, device=self._device) < self._config.dropout
            self._step, self._drawn = step, (noise, t, drop)
        noise, t, drop = self._drawn
        return noise[rows], t[rows], drop[rows]


def diffusion_losses(config: DiffusionConfig, device: torch.device) -> WeightedLosses:
    """Make the losses of diffusion training.

    Raises:
        ConfigError: One of them needs what diffusion training does not have.
    """
    available = frozenset({"step", "x0", "noise", "t", "x_t", "target", "prediction"})
    return WeightedLosses(config.losses, available=available, device=device, path="diffusion.losses")


class DiffusionModule(nn.Module):
    """What the engine trains: backbone and conditioner, with the loss computed inside ``forward``."""

    def __init__(self, backbone: Backbone, conditioner: Conditioner, losses: WeightedLosses) -> None:
        super().__init__()
        self.backbone = backbone
        self.conditioner = conditioner
        self._outside = (losses,)

    def forward(
        self, x0: Tensor, inputs: Tensor | Sequence[str], noise: Tensor, t: Tensor, drop: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss and its terms for B×d×h×w standardised latents."""
        (losses,) = self._outside
        dtype = next(self.backbone.parameters()).dtype
        x_t = interpolate(x0, noise, t)
        condition = self.conditioner(inputs, drop)
        prediction = self.backbone(x_t.to(dtype), t, condition)
        prediction = attrs.evolve(prediction, velocity=prediction.velocity.float())
        tensors = StepTensors(
            step=step,
            x0=x0,
            noise=noise,
            t=t,
            x_t=x_t,
            target=velocity_target(x0, noise),
            prediction=prediction,
        )
        total, terms = losses(tensors)
        return total, terms
