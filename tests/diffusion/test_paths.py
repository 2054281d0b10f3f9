"""Paths, predictions on them, and their reading as a velocity of the linear path."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor

import underpaint
from underpaint import Backbone, Condition, Prediction
from underpaint.diffusion.paths import PATHS, linear_velocity

TIMES = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
NAMES = ("linear", "cosine", "vp")
QUANTITIES = ("velocity", "noise", "data", "score")


def latents(seed: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, 4, 2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_by_differences(name: str) -> None:
    path, step = PATHS[name], 1e-5
    up, down, here = (path.coefficients(TIMES + d) for d in (step, -step, 0.0))
    torch.testing.assert_close(here.d_alpha, (up.alpha - down.alpha) / (2 * step), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(here.d_sigma, (up.sigma - down.sigma) / (2 * step), rtol=1e-7, atol=1e-8)


def test_cosine_and_linear_run_from_data_to_noise() -> None:
    for name in ("linear", "cosine"):
        c = PATHS[name].coefficients(torch.tensor([0.0, 1.0], dtype=torch.float64))
        np.testing.assert_allclose(c.alpha, [1.0, 0.0], atol=1e-15)
        np.testing.assert_allclose(c.sigma, [0.0, 1.0], atol=1e-15)


def test_vp_is_the_integral_of_beta() -> None:
    c = PATHS["vp"].coefficients(TIMES)
    for t, alpha, sigma in zip(TIMES.tolist(), c.alpha.tolist(), c.sigma.tolist()):
        area = integrate.quad(lambda s: 0.1 + s * 19.9, 0.0, t)[0]
        assert alpha == pytest.approx(math.exp(-area / 2), rel=1e-12)
        assert sigma == pytest.approx(math.sqrt(1 - math.exp(-area)), rel=1e-12)


def test_vp_follows_ddpm() -> None:
    # DDPM: 1000 steps, β from 1e-4 to 0.02, is this path at t = (n + 1)/1000 but for discretisation.
    bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    np.testing.assert_allclose(PATHS["vp"].coefficients(t).sigma.numpy(), np.sqrt(1 - bar), atol=2e-3)


def test_linear_mix_and_velocity() -> None:
    x0, noise = latents(0), latents(1)
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    x_t = PATHS["linear"].mix(x0, noise, t)
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[2], noise[2])
    torch.testing.assert_close(x_t[1], 0.75 * x0[1] + 0.25 * noise[1], rtol=1e-14, atol=0)
    assert torch.equal(PATHS["linear"].quantity("velocity", x0, noise, t), noise - x0)


@pytest.mark.parametrize(("name", "given"), list(itertools.product(NAMES, QUANTITIES)))
def test_data_and_noise_come_back_from_every_quantity(name: str, given: str) -> None:
    path = PATHS[name]
    x0, noise = latents(0, 19), latents(1, 19)
    x_t = path.mix(x0, noise, TIMES)
    found = path.split(given, path.quantity(given, x0, noise, TIMES), x_t, TIMES)
    torch.testing.assert_close(found, (x0, noise), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_velocity_is_the_derivative_of_the_state(name: str) -> None:
    path, step = PATHS[name], 1e-6
    x0, noise = latents(0, 19), latents(1, 19)
    slope = (path.mix(x0, noise, TIMES + step) - path.mix(x0, noise, TIMES - step)) / (2 * step)
    torch.testing.assert_close(path.quantity("velocity", x0, noise, TIMES), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_time_has_the_same_signal_to_noise_ratio(name: str) -> None:
    linear = torch.linspace(0.001, 0.99, 50, dtype=torch.float64)
    c = PATHS[name].coefficients(PATHS[name].time(linear))
    torch.testing.assert_close(c.sigma / c.alpha, linear / (1 - linear), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_time_keeps_the_ends(name: str) -> None:
    ends = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(PATHS[name].time(ends), ends, rtol=0, atol=1e-6)


MEAN, STD = 0.3, 0.5


class Perfect(Backbone):
    """The best prediction for data of N(MEAN, STD²) in every element, in closed form."""

    width = patch = 1

    def __init__(self, path: str, predicts: str) -> None:
        super().__init__()
        self.path, self.predicts = PATHS[path], predicts

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, layers: Collection[int] = ()) -> Prediction:
        c = self.path.coefficients(t).for_latents(x_t)
        # E[x0 | x] and E[ε | x] of jointly normal variables.
        away = (x_t - c.alpha * MEAN) / (c.alpha**2 * STD**2 + c.sigma**2)
        x0, noise = MEAN + c.alpha * STD**2 * away, c.sigma * away
        return Prediction(self.path.quantity(self.predicts, x0, noise, t))


@pytest.mark.parametrize(("name", "predicts"), list(itertools.product(NAMES, ("velocity", "noise", "data"))))
def test_perfect_networks_of_all_kinds_give_one_linear_velocity(name: str, predicts: str) -> None:
    t = torch.linspace(0.01, 0.985, 19, dtype=torch.float64)
    x_t = latents(3, 19)
    wide = t.view(-1, 1, 1, 1)
    variance = (1 - wide) ** 2 * STD**2 + wide**2
    # v = dx/dt of the flow x = (1−t)·m + √variance·z that carries N(0, 1) to N(m, s²).
    growth = (wide - (1 - wide) * STD**2) / variance
    expected = growth * (x_t - (1 - wide) * MEAN) - MEAN
    found = linear_velocity(Perfect(name, predicts), name, predicts)(x_t, t, Condition())
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("name", "predicts"), list(itertools.product(NAMES, ("velocity", "noise", "data"))))
def test_the_ends_of_the_linear_path_are_finite(name: str, predicts: str) -> None:
    found = linear_velocity(Perfect(name, predicts), name, predicts)(
        latents(3, 2).float(), torch.tensor([0.0, 1.0]), Condition()
    )
    assert bool(torch.isfinite(found).all())
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "predicts"), [("vp", "noise"), ("vp", "velocity"), ("vp", "data"), ("cosine", "data")]
)
def test_at_pure_noise_the_velocity_points_from_the_mean(name: str, predicts: str) -> None:
    noise = latents(4, 2)
    found = linear_velocity(Perfect(name, predicts), name, predicts)(noise, torch.ones(2), Condition())
    # α of the VP path is 0.0066 at its end, and the mean is not wholly gone from its states.
    torch.testing.assert_close(noise - found, torch.full_like(noise, MEAN), rtol=0, atol=0.02)


class Imperfect(Perfect):
    """The best prediction with an error of 3 % of the noise's size, the same at every time."""

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, layers: Collection[int] = ()) -> Prediction:
        error = 0.03 * torch.randn(x_t.shape, generator=torch.Generator().manual_seed(7), dtype=x_t.dtype)
        return Prediction(super().forward(x_t, t, condition).velocity + error)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize(("name", "predicts"), list(itertools.product(NAMES, ("velocity", "noise", "data"))))
def test_an_error_of_the_network_is_not_blown_up_where_noise_or_data_cannot_be_known(
    name: str, predicts: str, solver: str
) -> None:
    start = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler = underpaint.create("sampler", solver, steps=50)
    ends = {}
    for network in (Perfect, Imperfect):
        velocity = linear_velocity(network(name, predicts), name, predicts)
        ends[network] = sampler.sample(lambda x, t, v=velocity: v(x, t, Condition()), start, lambda: start)
    # The best network's samples have the data's deviation, but for the solver's steps.
    assert abs(float(ends[Perfect].std()) - STD) < 0.03
    assert abs(float(ends[Imperfect].std()) - STD) < 0.03
    assert float((ends[Imperfect] - ends[Perfect]).std()) < 0.15
