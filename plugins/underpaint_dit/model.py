"""The backbone."""

from __future__ import annotations

from collections.abc import Collection

import attrs
import torch
from torch import Tensor, nn

import underpaint
from underpaint import Backbone, Condition, Prediction, ddpm_fractions
from underpaint_dit.config import DiTConfig
from underpaint_dit.schedule import timestep

__all__ = ["DiT"]


class DiT(Backbone):
    """The transformer of DiT, which predicts noise and variance of a 1000-step process, as a velocity.

    DiT adds noise so that the variance stays: x_vp = √ᾱ·x0 + √(1 − ᾱ)·ε, ᾱ falling with the timestep. Ours is
    x_t = (1 − t)·x0 + t·ε. Both hold the same picture when their ratios of signal to noise are equal; then they differ
    by a factor only. `forward` therefore

    - divides by the standard deviation: x_vp = x_t / √((1 − t)² + t²);
    - finds the timestep of that ratio, between the table's 1000 by interpolation (`underpaint_dit.schedule.timestep`);
    - turns the noise into the velocity: ε − x0 = (ε − x_t) / (1 − t), since x0 = (x_t − t·ε) / (1 − t).

    At both ends the timestep is clamped. Below t = 0.0099 it is 0 and the formulas stay. Above t = 0.9937, where DiT
    knows no timestep, x_vp is read as a latent of timestep 999: x_t and t in the last formula are then those of that
    noise fraction, and the velocity is finite at t = 1, by at most 158·(ε − x_t).

    It is trained as published by the loss ``dit/hybrid`` at times of the distribution ``ddpm``. By the loss
    ``velocity``, which weights the squared error of the noise by 1/(1 − t)², the variance receives no gradient. It is
    handed on as `Prediction.variance`, for ``ddpm`` with ``variance: learned``.

    The network is that of ``sit/*``, which SiT took over from DiT; the labels are the conditioner's.

    Raises:
        ConfigError: The patch does not divide the grid, or the condition has tokens only.
    """

    variance = True

    def __init__(
        self, config: DiTConfig, *, latent_channels: int, grid: tuple[int, int], pooled_dim: int, token_dim: int
    ) -> None:
        super().__init__()
        self.width = config.width
        self.patch = config.patch
        self.network = underpaint.create(
            "backbone",
            "sit/S-2",
            latent_channels=latent_channels,
            grid=grid,
            pooled_dim=pooled_dim,
            token_dim=token_dim,
            outputs=2,
            **attrs.asdict(config),
        )

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, layers: Collection[int] = ()) -> Prediction:
        """Predict velocity and variance, in the type of `x_t`; see the class for the conversion.

        Raises:
            DataError: The latent, the condition or a layer does not fit the network.
        """
        last = ddpm_fractions(t.device)[-1]
        t = t.double()
        step = timestep(t)
        clamped = t.clamp(max=last)
        # In at least float32: 1 − t is small where there is much noise.
        precise = torch.promote_types(x_t.dtype, torch.float32)
        unit = x_t.to(precise) / _column(_deviation(t), precise)
        x = unit * _column(_deviation(clamped), precise)
        prediction = self.network(unit.to(x_t.dtype), step, condition, layers)
        noise, variance = prediction.velocity.chunk(2, dim=1)
        velocity = (noise.to(precise) - x) / _column(1.0 - clamped, precise)
        # From −1 at the lower bound to 1 at the upper one.
        return Prediction(velocity.to(x_t.dtype), prediction.hidden, variance=0.5 * (variance + 1.0))

    def blocks(self) -> list[nn.Module]:
        """Return the transformer blocks."""
        return self.network.blocks()


def _deviation(t: Tensor) -> Tensor:
    """Return the standard deviation of (1 − t)·x0 + t·ε for x0 and ε of standard deviation 1."""
    return torch.hypot(1.0 - t, t)


def _column(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).view(-1, 1, 1, 1)
