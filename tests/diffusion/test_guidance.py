"""Guidance: scale, channels, interval, and how often the network runs."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest
import torch
from torch import Tensor

from underpaint import Backbone, Condition, ConfigError, Prediction
from underpaint.config.schema import GuidanceConfig
from underpaint.diffusion.guidance import guided_field


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


def run(config: GuidanceConfig, t: Tensor = T) -> tuple[np.ndarray, list[int]]:
    backbone = Recorder()
    return guided_field(backbone, COND, NULL, config)(X, t).numpy(), backbone.batches


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
    with pytest.raises(ConfigError, match=r"guidance\.channels is 5, and the latent has 4"):
        run(GuidanceConfig(scale=2.0, channels=5))


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
    field = guided_field(backbone, COND, NULL, GuidanceConfig(scale=2.0, interval=(0.0, 0.6)))
    for time, expected in ((0.9, 3), (0.5, 6), (0.7, 3), (0.1, 6)):
        field(X, torch.full((3,), time))
        assert backbone.batches[-1] == expected
