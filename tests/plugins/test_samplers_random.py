"""Stochastic solvers: moments on Gaussian data, the noise of each sample, and REPA's sampler."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.plugins.test_samplers import MEAN, STD, gaussian, no_noise
from torch import Tensor

import underpaint
from underpaint import FreshNoise, Sampler

SHAPE = (40, 4, 32, 32)
COUNT = math.prod(SHAPE)


def make(name: str, **options: Any) -> Sampler:
    return underpaint.create("sampler", name, **options)


def variance_at(t: float) -> float:
    return (1 - t) ** 2 * STD**2 + t**2


def source(shape: tuple[int, ...], seed: int = 0) -> FreshNoise:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator)


def drawn(sampler: Sampler) -> Tensor:
    fresh = source(SHAPE)
    return sampler.sample(gaussian, fresh(), fresh).double()


def expect_moments(x: Tensor, mean: float, variance: float) -> None:
    assert abs(float(x.mean()) - mean) < 4 * math.sqrt(variance / COUNT)
    assert abs(float(x.var()) - variance) < 4 * variance * math.sqrt(2 / COUNT)


@pytest.mark.parametrize(("noise", "shift"), [(1.0, 1.0), (0.5, 1.0), (1.0, 3.0)])
def test_maruyama_moments_by_the_recursion_of_its_steps(noise: float, shift: float) -> None:
    # x' = x + Δt·(v − w·s/2) + √(w·|Δt|)·z with w = 2t·noise and the true score s = −(x − (1−t)·m)/variance.
    steps, last = 30, 0.04
    start = last / (shift - (shift - 1) * last)
    uniform = [1 - (1 - start) * i / (steps - 1) for i in range(steps)]
    grid = [*(shift * u / (1 + (shift - 1) * u) for u in uniform), 0.0]
    assert grid[-2] == pytest.approx(last)
    mean, variance = 0.0, 1.0
    for i, (now, after) in enumerate(pairwise(grid)):
        v = variance_at(now)
        slope = (now - (1 - now) * STD**2) / v + noise * now / v
        mean += (after - now) * (slope * (mean - (1 - now) * MEAN) - MEAN)
        variance *= (1 + (after - now) * slope) ** 2
        if i < steps - 1:
            variance += 2 * now * noise * (now - after)
    expect_moments(drawn(make("euler-maruyama", steps=steps, shift=shift, noise=noise)), mean, variance)


def test_maruyama_comes_to_the_data() -> None:
    # Its last step is the drift alone, which leaves noise of the order of 0.04 out: hence 5 %.
    x = drawn(make("euler-maruyama", steps=100))
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(x.std()) == pytest.approx(STD, rel=0.05)


def test_maruyama_without_noise_is_euler_on_its_grid() -> None:
    noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen: list[float] = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return gaussian(x, t)

    result = make("euler-maruyama", steps=5, noise=0.0).sample(field, noise, no_noise)
    assert seen == pytest.approx([1.0, 0.76, 0.52, 0.28, 0.04], rel=1e-6)
    x = noise
    for now, after in zip([1.0, 0.76, 0.52, 0.28, 0.04], [0.76, 0.52, 0.28, 0.04, 0.0]):
        x = x + (after - now) * gaussian(x, torch.full((2,), now, dtype=torch.float64))
    torch.testing.assert_close(result, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("constant", "recorded"),
    [
        (0.0, [0.202823052375, 0.348588473813, 0.494353895251]),
        (1.0, [1.513834510037, 1.659599931475, 1.805365352913]),
    ],
)
def test_maruyama_agrees_with_repas_sampler(constant: float, recorded: list[float]) -> None:
    # Recorded by running REPA's euler_maruyama_sampler for 10 steps on this velocity, all of its noise `constant`.
    noise = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64).view(1, 3, 1, 1)
    result = make("euler-maruyama", steps=10).sample(gaussian, noise, lambda: torch.full_like(noise, constant))
    assert result.flatten().tolist() == pytest.approx(recorded, abs=1e-7)


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_ddpm_moments_by_its_posterior(eta: float) -> None:
    steps = 25
    area = [0.1 * s + 19.9 * s**2 / 2 for s in (1 - i / steps for i in range(steps + 1))]
    bar = [0.0, *(math.exp(-a) for a in area[1:])]
    mean, variance = 0.0, 1.0
    for now, after in pairwise(bar):
        # DDPM (Ho et al. 2020, eq. 7) with ᾱ at both ends; DDIM (eq. 16) for the share η of its deviation.
        deviation = eta * math.sqrt((1 - after) / (1 - now) * (1 - now / after))
        keep = math.sqrt(max(0.0, 1 - after - deviation**2)) / math.sqrt(1 - now)
        # x' = keep·x + (√ᾱ' − keep·√ᾱ)·E[x0 | x] + deviation·z
        gain = math.sqrt(now) * STD**2 / (now * STD**2 + 1 - now)
        weight = math.sqrt(after) - keep * math.sqrt(now)
        mean = keep * mean + weight * (MEAN + gain * (mean - math.sqrt(now) * MEAN))
        variance = (keep + weight * gain) ** 2 * variance + deviation**2
    sampler = make("ddpm", steps=steps) if eta == 1.0 else make("ddim", steps=steps, eta=eta)
    expect_moments(drawn(sampler), mean, variance)


def test_ddpm_comes_to_the_data() -> None:
    # The posterior variance is the smaller bound on that of a step (Ho et al. 2020, §3.2): hence 5 %.
    x = drawn(make("ddpm", steps=250))
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(x.std()) == pytest.approx(STD, rel=0.05)


@pytest.mark.parametrize(("name", "without_noise"), [("euler-maruyama", {"noise": 0.0}), ("ddpm", {"eta": 0.0})])
def test_noise_is_drawn_once_before_every_point_but_the_last(name: str, without_noise: dict[str, float]) -> None:
    drawn: list[Tensor] = []

    def fresh() -> Tensor:
        drawn.append(noise())
        return drawn[-1]

    noise = source((2, 3, 4, 5))
    start = noise()
    sampled = make(name, steps=5).sample(gaussian, start, fresh)
    assert len(drawn) == 4
    replayed = make(name, steps=5).sample(gaussian, start, iter(drawn).__next__)
    assert torch.equal(sampled, replayed)
    plain = make(name, steps=5, **without_noise).sample(gaussian, start, no_noise)
    assert not torch.allclose(sampled, plain)


def test_the_state_is_kept_in_the_type_asked_for() -> None:
    seen: list[torch.dtype] = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.dtype)
        return gaussian(x, t)

    noise = torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    exact, plain = (make("euler-maruyama", steps=200, noise=0.0, float64=double) for double in (True, False))
    reference = plain.sample(field, noise.double(), no_noise)
    assert set(seen) == {torch.float64}
    seen.clear()
    error = [float((s.sample(field, noise, no_noise).double() - reference).abs().max()) for s in (exact, plain)]
    assert set(seen) == {torch.float32}
    assert error[0] < error[1]
