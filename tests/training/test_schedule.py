"""Learning rates against values worked out by hand."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from underpaint.config.engine import OptimizerConfig
from underpaint.training.schedule import rate_factor


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        # From 1 to 0.2 in four equal steps.
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        # 0.2 + 0.8·(1 + cos)/2 at 0°, 45°, 90°, 135°, 180°.
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.88284271, 0.6, 0.31715729, 0.2]),
    ],
)
def test_a_whole_schedule(schedule, expected):
    config = OptimizerConfig(warmup=4, schedule=schedule, final=0.2)
    assert [rate_factor(config, step, 9) for step in range(9)] == pytest.approx(expected)


def test_it_stays_at_the_end():
    config = OptimizerConfig(schedule="linear", final=0.3)
    assert rate_factor(config, 1000, 10) == pytest.approx(0.3)


def test_one_step_is_at_the_peak():
    assert rate_factor(OptimizerConfig(schedule="cosine"), 0, 1) == 1.0


@given(
    warmup=st.integers(0, 50),
    steps=st.integers(1, 100),
    schedule=st.sampled_from(["constant", "cosine", "linear"]),
    final=st.floats(0, 1),
)
def test_it_rises_then_never_rises_again(warmup, steps, schedule, final):
    config = OptimizerConfig(warmup=warmup, schedule=schedule, final=final)
    factors = [rate_factor(config, step, steps) for step in range(steps + 5)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    up, down = factors[:warmup], factors[warmup:]
    assert up == sorted(up)
    assert all(first >= second - 1e-12 for first, second in itertools.pairwise(down))
