"""Euler's method against closed forms."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import underpaint
from underpaint import Backbone, Condition, ConfigError, Prediction, Sampler
from underpaint.config.schema import GuidanceConfig
from underpaint.diffusion.guidance import guided_field

NOISE = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def euler(**options: Any) -> Sampler:
    return underpaint.create("sampler", "euler", **options)


@given(st.integers(1, 30), st.floats(0.1, 10.0))
@settings(max_examples=30, deadline=None)
def test_straight_paths_are_exact_at_any_grid(steps: int, shift: float) -> None:
    data = torch.ones_like(NOISE) * 0.3
    result = euler(steps=steps, shift=shift).sample(lambda x, t: NOISE - data, NOISE)
    torch.testing.assert_close(result, data, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_linear_field_is_the_product_of_its_steps(steps: int) -> None:
    # dx/dt = a·x from 1 to 0 in equal steps multiplies by (1 − a/steps) each time.
    rate = 1.7
    result = euler(steps=steps).sample(lambda x, t: rate * x, NOISE)
    torch.testing.assert_close(result, NOISE * (1 - rate / steps) ** steps, rtol=1e-12, atol=0)


def test_first_order_convergence_to_the_exponential() -> None:
    def error(steps: int) -> float:
        result = euler(steps=steps).sample(lambda x, t: x, NOISE)
        return float((result / NOISE - math.exp(-1.0)).abs().max())

    assert error(200) < 1.1 * error(100) / 2 < error(100)


@pytest.mark.parametrize("shift", [1.0, 1 / 0.3])
def test_time_reaches_the_field_shifted_and_from_noise_to_data(shift: float) -> None:
    seen: list[Tensor] = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    euler(steps=5, shift=shift).sample(field, NOISE)
    uniform = [1.0, 0.8, 0.6, 0.4, 0.2]
    expected = [shift * t / (1 + (shift - 1) * t) for t in uniform]
    assert [float(t[0]) for t in seen] == pytest.approx(expected, rel=1e-6)
    assert all(t.shape == (2,) and bool((t == t[0]).all()) for t in seen)


def test_result_keeps_type_and_noise_untouched() -> None:
    noise = NOISE.float()
    before = noise.clone()
    result = euler(steps=3).sample(lambda x, t: x.bfloat16(), noise)
    assert result.dtype == torch.float32
    assert torch.equal(noise, before)


def test_protocol_counts_evaluations_and_points() -> None:
    assert euler(steps=49, shift=2.0).protocol() == {
        "solver": "euler",
        "evaluations": 49,
        "grid_points": 50,
        "shift": 2.0,
    }


@pytest.mark.parametrize("options", [{"steps": 0}, {"shift": 0.0}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        euler(**options)


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
    euler(steps=249, shift=1 / 0.3).sample(guided_field(backbone, pooled, pooled, guidance), NOISE)
    assert backbone.batches == [2] * 73 + [4] * 176
