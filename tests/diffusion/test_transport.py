"""The path, its velocity, and the distribution of times."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from underpaint.config.schema import TimeConfig
from underpaint.diffusion.transport import interpolate, sample_time, shift_time, velocity_target

DRAWS = 200_000


def latents(seed: int) -> torch.Tensor:
    return torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_path_runs_from_data_to_noise() -> None:
    x0, noise = latents(0), latents(1)
    assert torch.equal(interpolate(x0, noise, torch.zeros(3)), x0)
    assert torch.equal(interpolate(x0, noise, torch.ones(3)), noise)
    quarter = interpolate(x0, noise, torch.full((3,), 0.25, dtype=torch.float64))
    np.testing.assert_allclose(quarter.numpy(), 0.75 * x0.numpy() + 0.25 * noise.numpy(), rtol=1e-14)


def test_each_sample_has_its_own_time() -> None:
    x0, noise = latents(0), latents(1)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    x_t = interpolate(x0, noise, t)
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[2], noise[2])
    np.testing.assert_allclose(x_t[1].numpy(), (x0[1].numpy() + noise[1].numpy()) / 2, rtol=1e-14)


@pytest.mark.parametrize("time", [0.1, 0.5, 0.9])
def test_velocity_is_the_derivative_of_the_path(time: float) -> None:
    x0, noise, step = latents(0), latents(1), 1e-4
    t = torch.full((3,), time, dtype=torch.float64)
    slope = (interpolate(x0, noise, t + step) - interpolate(x0, noise, t - step)) / (2 * step)
    torch.testing.assert_close(velocity_target(x0, noise), slope, rtol=1e-8, atol=1e-8)


@given(st.floats(0.0, 1.0), st.floats(0.05, 20.0))
def test_shift_maps_the_unit_interval_onto_itself(t: float, shift: float) -> None:
    time = torch.tensor([t], dtype=torch.float64)
    moved = shift_time(time, shift)
    assert 0.0 <= float(moved) <= 1.0 + 1e-12
    assert float(shift_time(moved, 1.0 / shift)) == pytest.approx(t, abs=1e-9)
    assert (float(moved) - t) * (shift - 1.0) >= -1e-12  # above 1 towards noise


def test_shift_known_points() -> None:
    # RAE: α = √(768·16·16/4096) = √48; the middle of the path moves to α/(1+α).
    alpha = math.sqrt(768 * 16 * 16 / 4096)
    moved = shift_time(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), alpha)
    np.testing.assert_allclose(moved.numpy(), [0.0, alpha / (1 + alpha), 1.0], rtol=1e-14)


def test_shift_agrees_with_lightningdit() -> None:
    # LightningDiT's time s = 1 − t runs the other way: s' = 0.3 s / (1 − 0.7 s).
    s = np.linspace(0, 1, 11)
    theirs = 0.3 * s / (1 - 0.7 * s)
    np.testing.assert_allclose(shift_time(torch.from_numpy(1 - s), 1 / 0.3).numpy(), 1 - theirs, atol=1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.7, 1.6)])
def test_logit_normal_moments_by_quadrature(mean: float, std: float, shift: float) -> None:
    config = TimeConfig(distribution="logit-normal", mean=mean, std=std, shift=shift)
    t = sample_time(config, DRAWS, torch.Generator().manual_seed(0)).double().numpy()

    def moment(power: int) -> float:
        def integrand(x: float) -> float:
            s = 1.0 / (1.0 + math.exp(-x))
            return float((shift * s / (1 + (shift - 1) * s)) ** power * stats.norm.pdf(x, mean, std))

        return float(integrate.quad(integrand, mean - 12 * std, mean + 12 * std)[0])

    first, second, fourth = moment(1), moment(2), moment(4)
    assert abs(t.mean() - first) < 4 * math.sqrt((second - first**2) / DRAWS)
    assert abs((t**2).mean() - second) < 4 * math.sqrt((fourth - second**2) / DRAWS)


def test_distributions_by_kolmogorov_smirnov() -> None:
    uniform = sample_time(TimeConfig(distribution="uniform"), DRAWS, torch.Generator().manual_seed(1))
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3
    config = TimeConfig(mean=0.4, std=0.8, shift=2.5)
    t = sample_time(config, DRAWS, torch.Generator().manual_seed(2)).double().numpy()
    unshifted = t / (2.5 - 1.5 * t)
    normal = np.log(unshifted / (1 - unshifted))
    assert stats.kstest(normal, stats.norm(0.4, 0.8).cdf).pvalue > 1e-3


def test_times_depend_on_the_generator_only() -> None:
    config = TimeConfig()
    first = sample_time(config, 8, torch.Generator().manual_seed(5))
    torch.manual_seed(99)
    second = sample_time(config, 8, torch.Generator().manual_seed(5), "cpu")
    assert torch.equal(first, second)
    assert first.shape == (8,)
    assert first.dtype == torch.float32
    assert not torch.equal(first, sample_time(config, 8, torch.Generator().manual_seed(6)))
    torch.manual_seed(7)
    a = sample_time(config, 8)
    torch.manual_seed(7)
    assert torch.equal(a, sample_time(config, 8))
