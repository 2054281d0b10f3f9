"""The distribution of times."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, optimize, stats

import underpaint
from underpaint import ConfigError
from underpaint.config.diffusion import TimeConfig
from underpaint.config.structure import structure
from underpaint.diffusion.times import sample_time, shift_factor, shift_time

DRAWS = 200_000


def draw(config: TimeConfig, seed: int = 0, **how: Any) -> np.ndarray:
    return sample_time(config, DRAWS, torch.Generator().manual_seed(seed), **how).double().numpy()


@given(st.floats(0.0, 1.0), st.floats(0.05, 20.0))
def test_shift_maps_the_unit_interval_onto_itself(t: float, shift: float) -> None:
    time = torch.tensor([t], dtype=torch.float64)
    moved = shift_time(time, shift)
    assert 0.0 <= float(moved) <= 1.0 + 1e-12
    assert float(shift_time(moved, 1.0 / shift)) == pytest.approx(t, abs=1e-9)
    assert (float(moved) - t) * (shift - 1.0) >= -1e-12  # above 1 towards noise


def test_shift_agrees_with_lightningdit() -> None:
    # LightningDiT's time s = 1 − t runs the other way: s' = 0.3 s / (1 − 0.7 s).
    s = np.linspace(0, 1, 11)
    theirs = 0.3 * s / (1 - 0.7 * s)
    np.testing.assert_allclose(shift_time(torch.from_numpy(1 - s), 1 / 0.3).numpy(), 1 - theirs, atol=1e-12)


RULES = [
    # RAE: √48 at 256 px and √192 at 512 px, for 768 channels at stride 16.
    ("latent", (768, 16, 16), 1, math.sqrt(48)),
    ("latent", (768, 32, 32), 1, math.sqrt(192)),
    ("tokens", (16, 16, 16), 1, 1.0),
    ("tokens", (16, 128, 128), 2, 4.0),
    ("tokens", (16, 64, 128), 2, math.sqrt(8)),
    # FLUX: base shift 0.5 at 256 tokens, 1.15 at 4096.
    ("flux", (16, 32, 32), 2, math.exp(0.5)),
    ("flux", (16, 128, 128), 2, math.exp(1.15)),
    (3.0, (16, 128, 128), 2, 3.0),
]


@pytest.mark.parametrize(("rule", "shape", "patch", "alpha"), RULES)
def test_shift_rules(rule: Any, shape: tuple[int, int, int], patch: int, alpha: float) -> None:
    assert shift_factor(rule, shape, patch) == pytest.approx(alpha, rel=1e-12)
    config = TimeConfig(distribution="uniform", shift=rule, patch=patch)
    t = draw(config, shape=shape)[:1000]
    plain = draw(TimeConfig(distribution="uniform"))[:1000]
    np.testing.assert_allclose(t, alpha * plain / (1 + (alpha - 1) * plain), atol=1e-6)


@pytest.mark.parametrize(("rule", "shape", "patch", "alpha"), RULES)
def test_samplers_shift_by_the_same_rules(rule: Any, shape: tuple[int, int, int], patch: int, alpha: float) -> None:
    seen: list[float] = []

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(float(t[0]))
        return torch.zeros_like(x)

    sampler = underpaint.create("sampler", "euler", steps=2, shift=rule, patch=patch)
    sampler.sample(field, torch.zeros(1, *shape), lambda: torch.zeros(1, *shape))
    assert seen == pytest.approx([1.0, alpha / (1 + alpha)], rel=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.7, 1.6)])
def test_logit_normal_moments_by_quadrature(mean: float, std: float, shift: float) -> None:
    t = draw(TimeConfig(distribution="logit-normal", mean=mean, std=std, shift=shift))

    def moment(power: int) -> float:
        def integrand(x: float) -> float:
            s = 1.0 / (1.0 + math.exp(-x))
            return float((shift * s / (1 + (shift - 1) * s)) ** power * stats.norm.pdf(x, mean, std))

        return float(integrate.quad(integrand, mean - 12 * std, mean + 12 * std)[0])

    first, second, fourth = moment(1), moment(2), moment(4)
    assert abs(t.mean() - first) < 4 * math.sqrt((second - first**2) / DRAWS)
    assert abs((t**2).mean() - second) < 4 * math.sqrt((fourth - second**2) / DRAWS)


def test_distributions_by_kolmogorov_smirnov() -> None:
    assert stats.kstest(draw(TimeConfig(distribution="uniform"), 1), "uniform").pvalue > 1e-3
    t = draw(TimeConfig(mean=0.4, std=0.8, shift=2.5), 2)
    unshifted = t / (2.5 - 1.5 * t)
    normal = np.log(unshifted / (1 - unshifted))
    assert stats.kstest(normal, stats.norm(0.4, 0.8).cdf).pvalue > 1e-3


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.81, 1.29, 1.75])
def test_mode_distribution(scale: float) -> None:
    def f_mode(u: float) -> float:  # Esser et al. 2024, as printed
        return 1 - u - scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)

    def below(t: float) -> float:
        return 1 - optimize.brentq(lambda u: f_mode(u) - t, 0.0, 1.0)

    t = draw(TimeConfig(distribution="mode", mode=scale), 3)[:4000]
    assert stats.kstest(t, np.vectorize(below)).pvalue > 1e-3


def test_truncated_logit_normal() -> None:
    low, high, mean, std = 0.2, 0.7, 0.3, 1.2
    t = draw(TimeConfig(mean=mean, std=std, range=(low, high)), 4)
    assert low <= t.min() < low + 1e-3
    assert high - 1e-3 < t.max() <= high + 1e-7
    ends = [(math.log(e / (1 - e)) - mean) / std for e in (low, high)]
    assert stats.kstest(np.log(t / (1 - t)), stats.truncnorm(*ends, loc=mean, scale=std).cdf).pvalue > 1e-3


def test_truncation_comes_before_the_shift() -> None:
    # RAE: [0, 0.999], then √48.
    alpha = math.sqrt(48)
    config = TimeConfig(distribution="uniform", range=(0.0, 0.999), shift="latent")
    t = draw(config, 5, shape=(768, 16, 16))
    largest = alpha * 0.999 / (1 + (alpha - 1) * 0.999)
    assert largest - 1e-4 < t.max() <= largest + 1e-7
    assert stats.kstest(t / (alpha - (alpha - 1) * t), stats.uniform(0, 0.999).cdf).pvalue > 1e-3


def test_late_switch_to_uniform() -> None:
    config = TimeConfig(std=0.3, uniform_from=600_000, range=(0.1, 0.9))
    before, after = draw(config, step=599_999), draw(config, step=600_000)
    assert stats.kstest(after, stats.uniform(0.1, 0.8).cdf).pvalue > 1e-3
    assert stats.kstest(before, stats.uniform(0.1, 0.8).cdf).pvalue < 1e-9


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


def test_the_config_reads_numbers_and_rules() -> None:
    assert structure({"shift": 2}, TimeConfig, "time").shift == 2
    assert structure({"shift": "flux"}, TimeConfig, "time").shift == "flux"


@pytest.mark.parametrize(
    "wrong", [{"shift": 0.0}, {"shift": "dimension"}, {"range": [0.9, 0.1]}, {"mode": 2.0}, {"std": 0.0}, {"patch": 0}]
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        structure(wrong, TimeConfig, "diffusion.time")


def test_times_of_ddpm_are_its_timesteps_alike() -> None:
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    ratio = np.sqrt(1 / kept - 1)
    table = (ratio / (1 + ratio)).astype(np.float32)
    found, counts = np.unique(draw(TimeConfig(distribution="ddpm")).astype(np.float32), return_counts=True)
    np.testing.assert_allclose(found, table, rtol=1e-6)
    # Each of 1000 is drawn 200 times, with a standard deviation of 14.
    assert np.abs(counts - DRAWS / 1000).max() < 5 * math.sqrt(DRAWS / 1000)
    half = draw(TimeConfig(distribution="ddpm", range=(0.2, 0.6))).astype(np.float32)
    assert set(np.unique(half)) == {t for t in table if 0.2 <= t <= 0.6}


def test_a_deviation_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="'std' is inf; give a finite number"):
        TimeConfig(std=math.inf)
