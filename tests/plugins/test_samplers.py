"""ODE solvers against closed forms."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import underpaint
from underpaint import Backbone, Condition, ConfigError, DataError, Prediction, Sampler
from underpaint.config.diffusion import GuidanceConfig
from underpaint.diffusion.guidance import guided_field
from underpaint.diffusion.paths import linear_velocity
from underpaint_samplers.config import StepsConfig
from underpaint_samplers.grid import uniform_grid

NOISE = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FIXED = ("euler", "heun", "ab2", "ddim")
MEAN, STD = 0.3, 0.5


def make(name: str, **options: Any) -> Sampler:
    return underpaint.create("sampler", name, **options)


def no_noise() -> Tensor:
    raise AssertionError("this solver adds no noise")


def gaussian(x: Tensor, t: Tensor) -> Tensor:
    """Velocity of the flow to data of N(MEAN, STD²): noise z goes to MEAN + STD·z."""
    wide = t.to(x.dtype).view(-1, 1, 1, 1)
    variance = (1 - wide) ** 2 * STD**2 + wide**2
    return (wide - (1 - wide) * STD**2) / variance * (x - (1 - wide) * MEAN) - MEAN


@given(st.sampled_from(FIXED), st.integers(1, 30), st.floats(0.1, 10.0))
@settings(max_examples=40)
def test_straight_paths_are_exact_at_any_grid(name: str, steps: int, shift: float) -> None:
    data = torch.ones_like(NOISE) * 0.3
    result = make(name, steps=steps, shift=shift).sample(lambda x, t: NOISE - data, NOISE, no_noise)
    torch.testing.assert_close(result, data, rtol=0, atol=1e-11)


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_euler_on_a_linear_field_is_the_product_of_its_steps(steps: int) -> None:
    # dx/dt = a·x from 1 to 0 in equal steps multiplies by (1 − a/steps) each time.
    rate = 1.7
    result = make("euler", steps=steps).sample(lambda x, t: rate * x, NOISE, no_noise)
    torch.testing.assert_close(result, NOISE * (1 - rate / steps) ** steps, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("ab2", 2), ("ddim", 1)])
def test_order_of_convergence_on_gaussian_data(name: str, order: int) -> None:
    def error(steps: int) -> float:
        result = make(name, steps=steps).sample(gaussian, NOISE, no_noise)
        return float((result - (MEAN + STD * NOISE)).abs().max())

    coarse, fine = error(80), error(160)
    assert fine < (0.05 if order == 1 else 2e-4)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("name", FIXED)
def test_shifted_grids_converge_too(name: str) -> None:
    result = make(name, steps=400, shift=2.5).sample(gaussian, NOISE, no_noise)
    torch.testing.assert_close(result, MEAN + STD * NOISE, rtol=0, atol=0.04 if name in ("euler", "ddim") else 1e-5)


def test_adaptive_keeps_its_tolerance_and_works_no_more_than_it_must() -> None:
    counts = []
    for tolerance in (1e-4, 1e-6):
        times: list[float] = []

        def field(x: Tensor, t: Tensor, times: list[float] = times) -> Tensor:
            times.append(float(t[0]))
            return gaussian(x, t)

        result = make("adaptive", rtol=tolerance, atol=tolerance).sample(field, NOISE, no_noise)
        assert float((result - (MEAN + STD * NOISE)).abs().max()) < 20 * tolerance
        assert all(0.0 <= t <= 1.0 for t in times)
        counts.append(len(times))
    assert counts[0] < counts[1] < 400


def test_adaptive_says_when_it_cannot() -> None:
    with pytest.raises(DataError, match="cannot keep rtol 1e-05"):
        make("adaptive").sample(lambda x, t: x * math.nan, NOISE, no_noise)
    with pytest.raises(DataError, match="max_steps"):
        make("adaptive", rtol=1e-9, atol=1e-9, max_steps=3).sample(gaussian, NOISE, no_noise)


@pytest.mark.parametrize("shift", [1.0, 1 / 0.3])
def test_time_reaches_the_field_shifted_and_from_noise_to_data(shift: float) -> None:
    seen: list[Tensor] = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    def expected(*uniform: float) -> Any:
        return pytest.approx([shift * t / (1 + (shift - 1) * t) for t in uniform], rel=1e-6)

    for name in ("euler", "ab2"):
        make(name, steps=5, shift=shift).sample(field, NOISE, no_noise)
        assert [float(t[0]) for t in seen] == expected(1.0, 0.8, 0.6, 0.4, 0.2)
        assert all(t.shape == (2,) and bool((t == t[0]).all()) for t in seen)
        seen.clear()
    make("heun", steps=2, shift=shift).sample(field, NOISE, no_noise)
    assert [float(t[0]) for t in seen] == expected(1.0, 0.5, 0.5, 0.0)


@pytest.mark.parametrize("name", [*FIXED, "adaptive"])
def test_result_keeps_type_and_noise_untouched(name: str) -> None:
    noise = NOISE.float()
    before = noise.clone()
    result = make(name).sample(lambda x, t: x.bfloat16(), noise, no_noise)
    assert result.dtype == torch.float32
    assert torch.equal(noise, before)


@pytest.mark.parametrize(("name", "solver", "factor"), [("euler", "euler", 1), ("heun", "heun", 2), ("ab2", "ab2", 1)])
def test_protocol_tells_evaluations_from_points(name: str, solver: str, factor: int) -> None:
    assert make(name, steps=49, shift=2.0).protocol() == {
        "solver": solver,
        "evaluations": 49 * factor,
        "grid_points": 50,
        "shift": 2.0,
    }
    assert make(name, shift="flux", patch=2).protocol()["patch"] == 2


def test_every_option_is_in_the_protocol() -> None:
    changes: dict[str, list[dict[str, Any]]] = {
        "euler": [{"steps": 7}, {"end": 0.1}, {"shift": 2.0}, {"shift": "latent"}, {"shift": "tokens", "patch": 2}],
        "euler-maruyama": [{"steps": 7}, {"shift": 2.0}, {"last": 0.1}, {"noise": 0.5}, {"float64": False}],
        "ddim": [{"steps": 7}, {"shift": 2.0}, {"eta": 0.5}, {"schedule": "discrete"}],
        "ddpm": [{"variance": "learned"}],
        "adaptive": [{"rtol": 1e-3}, {"atol": 1e-3}],
    }
    seen = [make(name).protocol() for name in ("heun", "ab2")]
    seen += [make(name, **change).protocol() for name, every in changes.items() for change in [{}, *every]]
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler", {"steps": 0}),
        ("euler", {"shift": 0.0}),
        ("euler", {"end": 1.0}),
        ("ddim", {"end": 0.1}),
        ("heun", {"shift": "dimension"}),
        ("ab2", {"patch": 0}),
        ("euler-maruyama", {"steps": 1}),
        ("euler-maruyama", {"last": 0.0}),
        ("ddim", {"eta": 1.5}),
        ("adaptive", {"rtol": 0.0}),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make(name, **options)


def test_ddim_is_the_textbook_step_on_the_variance_preserving_path() -> None:
    steps = 6
    area = [20.0 * s**2 / 2 + 0.1 * (s - s**2 / 2) for s in (1 - i / steps for i in range(steps + 1))]
    alpha = np.exp(-np.asarray(area) / 2)
    alpha[0] = 0.0  # the flow starts at pure noise
    sigma = np.sqrt(1 - alpha**2)
    x = NOISE.clone()
    for i in range(steps):
        # The network sees the flow's state: that of DDPM, divided by α + σ.
        t = sigma[i] / (alpha[i] + sigma[i])
        flow = x / (alpha[i] + sigma[i])
        velocity = gaussian(flow, torch.full((2,), t, dtype=torch.float64))
        epsilon = flow + (1 - t) * velocity
        x0 = (x - sigma[i] * epsilon) / alpha[i] if i else flow - velocity
        x = alpha[i + 1] * x0 + sigma[i + 1] * epsilon
    torch.testing.assert_close(make("ddim", steps=steps).sample(gaussian, NOISE, no_noise), x, rtol=0, atol=1e-6)


class Counter(Backbone):
    width = 1
    patch = 1

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, layers: Collection[int] = ()) -> Prediction:
        self.batches.append(x_t.shape[0])
        return Prediction(torch.zeros_like(x_t))


def test_lightningdit_settings_leave_73_of_249_steps_unguided() -> None:
    # Seen by running LightningDiT: 250 grid points make 249 steps, the first 73 below the interval start 0.11 of its
    # own time, with its timestep shift of 0.3.
    backbone = Counter()
    guidance = GuidanceConfig(scale=10.0, channels=3, interval=(0.0, 0.89))
    pooled = Condition(pooled=torch.zeros(2, 1))
    field = guided_field(linear_velocity(backbone, "linear", "velocity"), pooled, guidance, null=pooled)
    make("euler", steps=249, shift=1 / 0.3).sample(field, NOISE, no_noise)
    assert backbone.batches == [2] * 73 + [4] * 176


@pytest.mark.parametrize(
    ("steps", "shift", "second", "last", "recorded"),
    [
        (49, math.sqrt(48), 0.997005045, 0.131505057, [-0.142324878, 0.518063160, 1.178451198]),
        (10, 1.0, 0.900099993, 0.100899994, [-0.130803995, 0.514952003, 1.160708001]),
    ],
)
def test_agrees_with_raes_sampler(steps: int, shift: float, second: float, last: float, recorded: list[float]) -> None:
    # Recorded by running RAE's sample_ode on this velocity, with 50 and with 11 of its steps: the times of its second
    # and last evaluation, and its latents. Its grid ends at 0.001 before the shift, which √48 makes 0.0069.
    seen: list[float] = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return gaussian(x, t)

    noise = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64).view(1, 3, 1, 1)
    result = make("euler", steps=steps, shift=shift, end=0.001).sample(field, noise, no_noise)
    assert len(seen) == steps
    assert (seen[0], seen[1], seen[-1]) == pytest.approx((1.0, second, last), abs=1e-6)
    assert result.flatten().tolist() == pytest.approx(recorded, abs=1e-6)


def test_the_shift_of_raes_latents() -> None:
    # rae.md §3.1: √(768·16·16 / 4096) = 6.93, so that the grid ends at 0.0069 (§3.3).
    config = StepsConfig(steps=49, shift="latent", end=0.001)
    assert uniform_grid(config, torch.zeros(1, 768, 16, 16))[-1] == pytest.approx(0.0069, abs=5e-5)


@pytest.mark.parametrize("name", ["euler", "heun", "ab2"])
def test_an_early_end_leaves_the_noise_of_its_time(name: str) -> None:
    # The exact flow has carried z to (1 − t)·MEAN + √variance·z by the time t.
    t = 2.0 * 0.3 / 1.3
    result = make(name, steps=400, shift=2.0, end=0.3).sample(gaussian, NOISE, no_noise)
    exact = (1 - t) * MEAN + math.sqrt((1 - t) ** 2 * STD**2 + t**2) * NOISE
    torch.testing.assert_close(result, exact, rtol=0, atol=0.02 if name == "euler" else 1e-4)
