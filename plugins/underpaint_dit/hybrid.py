"""The loss that DiT is trained by: the noise's squared error, and a bound of the likelihood for the variance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from underpaint import ConfigError, Loss, StepTensors, ddpm_fractions
from underpaint_dit.schedule import timestep

__all__ = ["Hybrid"]


class Hybrid(Loss):
    """L_hybrid of Nichol & Dhariwal 2021 (eq. 16), each of its two terms a mean over samples and elements.

    - ``noise``: (ε̂ − ε)², with ε̂ = x_t + (1 − t)·v̂ (L_simple, Ho et al. 2020, eq. 14).
    - ``vlb``: the bound's term of the sample's own timestep, in bits: the divergence of DDPM's step, of mean μ̂ and
      log σ² = f·log β + (1 − f)·log β̃, from the posterior of mean μ and variance β̃, where
      (μ̂ − μ)² = (ε̂ − ε)²·β²/((1 − ᾱ)(1 − β)). Only the fraction f receives its gradient. At the first timestep, where
      the posterior has no variance, it is the negative log-density of x0, and β̃ is that of the second. Pixels of 8 bit
      have a probability there; latents have none.

    The paper's λ = 0.001 is of the sum over 1000 timesteps; of one timestep it is 1. The noise fractions are to be
    those of DDPM's table, ``diffusion.time.distribution: ddpm``; one between two of them counts as the nearer.

    Raises:
        ConfigError: (by `forward`) The backbone has learned no variance, or the training is not that of velocity on the
            linear path.
    """

    needs = frozenset({"x0", "noise", "t", "x_t", "target", "prediction"})

    def __init__(self) -> None:
        super().__init__()
        self._fits = False

    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return ``noise`` and ``vlb``."""
        assert step.prediction is not None
        assert step.noise is not None
        assert step.t is not None
        assert step.x_t is not None
        variance = step.prediction.variance
        if variance is None:
            raise ConfigError(
                "The loss 'dit/hybrid' trains a variance, and the backbone gives none; take a backbone of DiT, such as "
                "'dit/XL-2', or the loss 'velocity'."
            )
        self._check(step)
        error = step.x_t + _column(1.0 - step.t.double()) * step.prediction.velocity - step.noise
        bound = _bound(error.detach(), variance.float(), timestep(step.t).round().long())
        return {"noise": error.square().mean(), "vlb": bound.mean() / math.log(2.0)}

    def _check(self, step: StepTensors) -> None:
        if self._fits:
            return
        assert step.x0 is not None
        assert step.noise is not None
        assert step.target is not None
        if not torch.allclose(step.target, step.noise - step.x0, rtol=1e-3, atol=1e-3):
            raise ConfigError(
                "The loss 'dit/hybrid' reads the noise from the velocity of the linear path; remove diffusion.path and "
                "diffusion.predicts."
            )
        self._fits = True


def _bound(error: Tensor, fraction: Tensor, now: Tensor) -> Tensor:
    """Return the bound's terms in nats, B×d×h×w, for the errors of the noise at timesteps of shape B."""
    t = ddpm_fractions(now.device)
    kept = (1.0 - t).square() / ((1.0 - t).square() + t.square())
    before = torch.cat((torch.ones_like(kept[:1]), kept[:-1]))
    beta = 1.0 - kept / before
    posterior = (1.0 - before) / (1.0 - kept) * beta
    # The first timestep's own is zero.
    posterior = torch.cat((posterior[1:2], posterior[1:]))
    distance = _column((beta.square() / ((1.0 - kept) * (1.0 - beta) * posterior))[now]) * error.square()
    above = fraction * _column((beta / posterior).log()[now])  # log σ² − log β̃
    divergence = 0.5 * (above - 1.0 + (1.0 + distance) * torch.exp(-above))
    density = 0.5 * (_column((2.0 * math.pi * posterior).log()[now]) + above + distance * torch.exp(-above))
    return torch.where(now.view(-1, 1, 1, 1) == 0, density, divergence)


def _column(values: Tensor) -> Tensor:
    return values.float().view(-1, 1, 1, 1)
