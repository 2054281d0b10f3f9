"""The loss that DiT is trained by, against the formulas of DDPM in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import underpaint
from underpaint import ConfigError, Loss, Prediction, StepTensors, ddpm_fractions

SHAPE = (4, 3, 5)


def table() -> np.ndarray:
    """ᾱ of the 1000 timesteps."""
    return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def step(timestep: int, *, error: float = 0.3, seed: int = 0, **changes: Any) -> StepTensors:
    """One sample at a timestep, with a predicted noise that is off by about `error`."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise, off = (torch.randn(1, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(3))
    fraction = torch.rand(1, *SHAPE, generator=generator, dtype=torch.float64) * 1.2 - 0.1
    t = ddpm_fractions()[[timestep]]
    x_t = (1 - t) * x0 + t * noise
    velocity = (noise + error * off - x_t) / (1 - t)
    given: dict[str, Any] = {
        "x0": x0,
        "noise": noise,
        "t": t,
        "x_t": x_t,
        "target": noise - x0,
        "prediction": Prediction(velocity, variance=fraction),
    }
    return StepTensors(step=0, **{**given, **changes})


def make() -> Loss:
    return underpaint.create("loss", "dit/hybrid")


def by_the_paper(tensors: StepTensors, index: int) -> tuple[Tensor, Tensor]:
    """L_simple and the bound's term, from the posterior and the step of DDPM (Ho et al. 2020, eq. 6 to 11)."""
    assert tensors.prediction is not None
    x0, noise, fraction = tensors.x0, tensors.noise, tensors.prediction.variance
    assert x0 is not None
    assert noise is not None
    assert fraction is not None
    t = float(ddpm_fractions()[index])
    predicted_data = tensors.x_t - t * tensors.prediction.velocity
    kept, before = table()[index], table()[index - 1] if index else 1.0
    beta = 1 - kept / before
    x = math.sqrt(kept) * x0 + math.sqrt(1 - kept) * noise
    predicted_noise = (x - math.sqrt(kept) * predicted_data) / math.sqrt(1 - kept)

    def mean(data: Tensor) -> Tensor:
        there = math.sqrt(before) * beta * data + math.sqrt(1 - beta) * (1 - before) * x
        return there / (1 - kept)

    second = table()[1]
    smallest = (
        (1 - before) / (1 - kept) * beta if index else (1 - table()[0]) / (1 - second) * (1 - second / table()[0])
    )
    spread = torch.exp(0.5 * (fraction * math.log(beta) + (1 - fraction) * math.log(smallest)))
    given = Normal(mean(predicted_data), spread)
    posterior = Normal(mean(x0), torch.full_like(x0, math.sqrt(smallest)))
    bound = kl_divergence(posterior, given) if index else -given.log_prob(x0)
    return (predicted_noise - noise).square().mean(), bound.mean() / math.log(2)


@pytest.mark.parametrize("index", [0, 1, 2, 250, 613, 999])
def test_terms_are_those_of_the_papers(index: int) -> None:
    tensors = step(index)
    terms = make()(tensors)
    noise, bound = by_the_paper(tensors, index)
    assert float(terms["noise"]) == pytest.approx(float(noise), rel=1e-5)
    assert float(terms["vlb"]) == pytest.approx(float(bound), rel=1e-4)


def test_times_in_float32_are_near_enough() -> None:
    for index in (0, 1, 500, 999):
        tensors = step(index)
        assert tensors.t is not None
        exact = make()(tensors)
        rounded = make()(step(index, t=tensors.t.float()))
        for name in ("noise", "vlb"):
            assert float(rounded[name]) == pytest.approx(float(exact[name]), rel=0.02), (index, name)


def test_the_bound_teaches_the_fraction_alone_and_the_error_the_velocity_alone() -> None:
    tensors = step(400)
    assert tensors.prediction is not None
    velocity, fraction = tensors.prediction.velocity.requires_grad_(), tensors.prediction.variance
    assert fraction is not None
    fraction.requires_grad_()
    terms = make()(tensors)
    assert torch.autograd.grad(terms["noise"], [velocity, fraction], retain_graph=True, allow_unused=True)[1] is None
    other, own = torch.autograd.grad(terms["vlb"], [velocity, fraction], allow_unused=True)
    assert other is None
    assert own is not None
    assert bool((own != 0).any())


def test_the_best_variance_is_the_posteriors_and_the_squared_error() -> None:
    # Of divergences from N(μ, β̃) to N(μ̂, σ²) that with σ² = β̃ + (μ̂ − μ)² is smallest.
    index, error = 30, 0.2
    kept, before = table()[index], table()[index - 1]
    beta = 1 - kept / before
    smallest = (1 - before) / (1 - kept) * beta
    tensors = step(index, error=0.0)
    assert tensors.prediction is not None
    assert tensors.x_t is not None
    assert tensors.t is not None
    assert tensors.noise is not None
    velocity = (tensors.noise + error - tensors.x_t) / (1 - tensors.t)
    distance = error**2 * beta**2 / ((1 - kept) * (1 - beta))
    best = math.log((smallest + distance) / smallest) / math.log(beta / smallest)

    def bound(fraction: float) -> float:
        variance = torch.full_like(velocity, fraction)
        return float(make()(step(index, error=0.0, prediction=Prediction(velocity, variance=variance)))["vlb"])

    assert bound(best) < min(bound(best + 0.05), bound(best - 0.05))


def test_a_backbone_without_variance_and_other_targets_are_refused() -> None:
    tensors = step(3)
    assert tensors.prediction is not None
    with pytest.raises(ConfigError, match=r"trains a variance, and the backbone gives none; take a backbone of DiT"):
        make()(step(3, prediction=Prediction(tensors.prediction.velocity)))
    with pytest.raises(ConfigError, match=r"remove diffusion\.path and diffusion\.predicts"):
        make()(step(3, target=tensors.noise))
