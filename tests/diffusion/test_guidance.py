"""Guidance: scale, channels, interval, and how often the network runs."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest
import torch
from torch import Tensor

from underpaint import Backbone, Condition, ConfigError, Prediction
from underpaint.config.diffusion import GuidanceConfig
from underpaint.config.structure import structure
from underpaint.diffusion.guidance import check_guidance, guided_field
from underpaint.diffusion.paths import linear_velocity
from underpaint.interfaces.sampler import VelocityField


class Recorder(Backbone):
    """velocity = x·(t + 1) + pooled, which tells conditions, times and batch order apart."""

    width = 4
    patch = 1

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, layers: Collection[int] = ()) -> Prediction:
        self.batches.append(x_t.shape[0])
        assert condition.pooled is not None
        assert t.shape == (x_t.shape[0],) == condition.pooled.shape[:1]
        return Prediction(x_t * (t + 1)[:, None, None, None] + condition.pooled[:, :, None, None])


X = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
COND = Condition(pooled=torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
NULL = Condition(pooled=torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64))


def plain(condition: Condition) -> np.ndarray:
    assert condition.pooled is not None
    return X.numpy() * (T.numpy() + 1)[:, None, None, None] + condition.pooled.numpy()[:, :, None, None]


def by_null(backbone: Recorder, config: GuidanceConfig) -> VelocityField:
    return guided_field(linear_velocity(backbone, "linear", "velocity"), COND, config, null=NULL)


def run(config: GuidanceConfig, t: Tensor = T) -> tuple[np.ndarray, list[int]]:
    backbone = Recorder()
    return by_null(backbone, config)(X, t).numpy(), backbone.batches


def test_scale_one_runs_the_conditional_network_alone() -> None:
    velocity, batches = run(GuidanceConfig(scale=1.0))
    np.testing.assert_array_equal(velocity, plain(COND))
    assert batches == [3]


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 10.0])
def test_scale_extrapolates_in_one_doubled_batch(scale: float) -> None:
    velocity, batches = run(GuidanceConfig(scale=scale))
    np.testing.assert_allclose(velocity, (1 - scale) * plain(NULL) + scale * plain(COND), rtol=1e-12, atol=1e-12)
    assert batches == [6]


def test_only_the_first_channels_are_guided() -> None:
    velocity, _ = run(GuidanceConfig(scale=4.0, channels=3))
    full = 4 * plain(COND) - 3 * plain(NULL)
    np.testing.assert_allclose(velocity[:, :3], full[:, :3], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(velocity[:, 3:], plain(COND)[:, 3:])


def test_all_channels_by_number_is_all_channels() -> None:
    np.testing.assert_array_equal(run(GuidanceConfig(scale=3.0, channels=4))[0], run(GuidanceConfig(scale=3.0))[0])


def test_more_channels_than_there_are_is_an_error() -> None:
    check_guidance(GuidanceConfig(scale=2.0, channels=4), 4)
    with pytest.raises(ConfigError, match=r"guidance\.channels is 5, and the latent has 4"):
        check_guidance(GuidanceConfig(scale=2.0, channels=5), 4)


@pytest.mark.parametrize("interval", [[0.5, 0.2], [0.3, 0.3], [-0.1, 0.5], [0.5, 1.1]])
def test_an_interval_must_run_upwards_within_the_path(interval: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"guidance\.interval is .* 0 ≤ low < high ≤ 1"):
        structure({"interval": interval}, GuidanceConfig, "evaluation.guidance")


def test_interval_is_judged_sample_by_sample_with_both_ends() -> None:
    velocity, batches = run(GuidanceConfig(scale=3.0, interval=(0.2, 0.5)))
    guided = 3 * plain(COND) - 2 * plain(NULL)
    np.testing.assert_allclose(velocity[:2], guided[:2], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(velocity[2], plain(COND)[2])
    assert batches == [6]


def test_outside_the_interval_the_null_condition_costs_nothing() -> None:
    velocity, batches = run(GuidanceConfig(scale=3.0, interval=(0.3, 0.4)))
    np.testing.assert_array_equal(velocity, plain(COND))
    assert batches == [3]


def test_field_carries_no_state_between_calls() -> None:
    backbone = Recorder()
    field = by_null(backbone, GuidanceConfig(scale=2.0, interval=(0.0, 0.6)))
    for time, expected in ((0.9, 3), (0.5, 6), (0.7, 3), (0.1, 6)):
        field(X, torch.full((3,), time))
        assert backbone.batches[-1] == expected


def test_a_weaker_model_is_guided_away_from_under_the_same_condition() -> None:
    main, weak = Recorder(), Recorder()
    config = GuidanceConfig(scale=1.5, channels=3, interval=(0.2, 0.5))

    def weaker(x_t: Tensor, t: Tensor) -> Tensor:
        return 0.5 * linear_velocity(weak, "linear", "velocity")(x_t, t, COND)

    field = guided_field(linear_velocity(main, "linear", "velocity"), COND, config, weak=weaker)
    velocity = field(X, T).numpy()
    # v_weak + w·(v − v_weak) with v_weak = v/2.
    np.testing.assert_allclose(velocity[:2, :3], 1.25 * plain(COND)[:2, :3], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(velocity[:2, 3:], plain(COND)[:2, 3:])
    np.testing.assert_array_equal(velocity[2], plain(COND)[2])
    assert (main.batches, weak.batches) == ([3], [3])
    field(X, torch.full((3,), 0.9, dtype=torch.float64))
    assert (main.batches, weak.batches) == ([3, 3], [3])
