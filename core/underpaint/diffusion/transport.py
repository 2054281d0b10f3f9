"""The straight path between data and noise, and the times at which it is trained.

t is the noise fraction everywhere: 0 is data, 1 is noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from underpaint.config.schema import TimeConfig

__all__ = ["interpolate", "sample_time", "shift_time", "velocity_target"]


def sample_time(
    config: TimeConfig, batch: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw the noise fractions of a training batch.

    ``uniform`` is uniform on [0, 1); ``logit-normal`` is the sigmoid of a normal variable (Esser et al. 2024,
    §3.1). The shift is applied to what was drawn.

    Args:
        config: Distribution and shift.
        batch: B.
        generator: Source of randomness; None takes the global one of `device`. Draws happen on the generator's
            own device, so a CPU generator gives the same times on every machine.
        device: Where the times are wanted.

    Returns:
        float32 of shape B, in [0, 1].
    """
    source = torch.device(device) if generator is None else generator.device
    if config.distribution == "uniform":
        t = torch.rand(batch, generator=generator, device=source)
    else:
        t = torch.sigmoid(torch.randn(batch, generator=generator, device=source) * config.std + config.mean)
    return shift_time(t, config.shift).to(device)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Return α·t / (1 + (α − 1)·t): noise fractions moved towards noise when α = `shift` is above 1.

    Esser et al. 2024, §5.3.2. It maps [0, 1] onto itself, keeps both ends, and 1/α undoes it. A latent of
    C·H·W values is as noisy as one of 4096 values at α = √(C·H·W / 4096) (RAE, §3.1).
    """
    return shift * t / (1.0 + (shift - 1.0) * t)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t = (1 − t)·x0 + t·noise.

    Args:
        x0: B×d×h×w latents.
        noise: B×d×h×w standard normal noise.
        t: B noise fractions.

    Returns:
        B×d×h×w, in the wider of the types of `x0` and `t`.
    """
    t = t.reshape(-1, *[1] * (x0.ndim - 1))
    return (1.0 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """Return noise − x0: the derivative of `interpolate` with respect to t, the same at every t."""
    return noise - x0
