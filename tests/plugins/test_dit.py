"""DiT: its process as noise fractions, the conversion to a velocity. What all backbones do: test_backbones."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.plugins import backbones
from tests.plugins.backbones import disturbed, inputs
from torch import Tensor, nn

from underpaint import Condition, Prediction, ddpm_fractions
from underpaint_dit.schedule import timestep

TINY = backbones.TINY["dit/S-2"]
make = partial(backbones.make, "dit/S-2")
FIRST, LAST = 0.0099, 0.9937
"""Noise fractions of timesteps 0 and 999, to four digits."""


# ------------------------------------------------------------------------------------------------ the process


def table() -> np.ndarray:
    """ᾱ as a sum of logarithms, the betas equally spaced from 1e-4 to 2e-2."""
    beta = np.array([1e-4 + (2e-2 - 1e-4) * i / 999 for i in range(1000)])
    return np.exp(np.cumsum(np.log1p(-beta)))


def test_the_table_is_that_of_the_linear_schedule() -> None:
    t = ddpm_fractions().numpy()
    kept = (1 - t) ** 2 / ((1 - t) ** 2 + t**2)
    np.testing.assert_allclose(kept, table(), rtol=1e-11)
    # Printed by the original: timesteps 0, 1, 250, 613, 999.
    recorded = [0.9999, 0.9997800920720721, 0.5214230306185275, 0.021798901233696977, 4.035829765375676e-05]
    np.testing.assert_allclose(kept[[0, 1, 250, 613, 999]], recorded, rtol=1e-9)


def test_fractions_have_the_ratio_of_their_timestep() -> None:
    t = ddpm_fractions().numpy()
    np.testing.assert_allclose((1 - t) ** 2 / t**2, table() / (1 - table()), rtol=1e-9)
    assert (round(t[0], 4), round(t[-1], 4)) == (FIRST, LAST)


def test_timesteps_are_exact_at_the_table() -> None:
    np.testing.assert_allclose(timestep(ddpm_fractions()).numpy(), np.arange(1000), atol=1e-9)
    # What float32 loses of t is less than a fiftieth of a step.
    np.testing.assert_allclose(timestep(ddpm_fractions().float()).numpy(), np.arange(1000), atol=0.02)


@settings(max_examples=200)
@given(st.floats(0.0, 1.0))
def test_timesteps_interpolate_the_logarithm_of_the_ratio(t: float) -> None:
    ratio = np.sqrt((1 - table()) / table())
    with np.errstate(divide="ignore"):
        expected = np.interp(np.log(np.float64(t) / np.float64(1 - t)) if t < 1 else np.inf, np.log(ratio), range(1000))
    assert float(timestep(torch.tensor([t], dtype=torch.float64))) == pytest.approx(expected, abs=1e-6)


def test_timesteps_are_clamped() -> None:
    t = torch.tensor([0.0, 1e-12, 0.009, 0.994, 1.0])
    assert timestep(t).tolist() == [0.0, 0.0, 0.0, 999.0, 999.0]


# --------------------------------------------------------------------------------------------- the conversion


class Oracle(nn.Module):
    """A network that knows the noise, and notes what it is given."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise = noise
        self.variance = 99.0

    def forward(self, x: Tensor, t: Tensor, condition: Condition, layers: Any = ()) -> Prediction:
        self.x, self.t = x, t
        return Prediction(torch.cat((self.noise, torch.full_like(self.noise, self.variance)), dim=1))


def oracle(noise: Tensor) -> tuple[Any, Any]:
    model = make(**TINY)
    model.network = Oracle(noise)
    return model, model.network


@pytest.mark.parametrize("t", [0.0, 0.001, 0.3, 0.5, 0.9, 0.993])
def test_the_right_noise_gives_the_right_velocity(t: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, 4, 4, 4, generator=generator, dtype=torch.float64)
    model, network = oracle(noise)
    time = torch.tensor([t], dtype=torch.float64)
    velocity = model((1 - t) * x0 + t * noise, time, Condition()).velocity
    torch.testing.assert_close(velocity, noise - x0)
    # What the network saw is DiT's own mixture at that ratio of signal to noise.
    kept = (1 - t) ** 2 / ((1 - t) ** 2 + t**2)
    torch.testing.assert_close(network.x, math.sqrt(kept) * x0 + math.sqrt(1 - kept) * noise)


def test_table_points_are_dits_own_latents() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 4, 4, 4, generator=generator, dtype=torch.float64)
    model, network = oracle(noise)
    steps = torch.tensor([0, 1, 500, 999])
    t = ddpm_fractions()[steps]
    column = t[:, None, None, None]
    model((1 - column) * x0 + column * noise, t, Condition())
    kept = torch.from_numpy(table())[steps][:, None, None, None]
    torch.testing.assert_close(network.x, kept.sqrt() * x0 + (1 - kept).sqrt() * noise)
    torch.testing.assert_close(network.t, steps.double())


def test_pure_noise_is_read_as_the_last_timestep() -> None:
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model, network = oracle(0.9 * noise)
    velocity = model(noise, torch.ones(2, dtype=torch.float64), Condition()).velocity
    assert torch.equal(network.x, noise)
    assert network.t.tolist() == [999.0, 999.0]
    # √ᾱ·x0 = x − √(1 − ᾱ)·ε, in the scale of our path at that noise fraction.
    kept = table()[-1]
    x0 = (noise - math.sqrt(1 - kept) * 0.9 * noise) / math.sqrt(kept)
    torch.testing.assert_close(velocity, 0.9 * noise - x0)


def test_velocity_is_continuous_where_it_is_clamped() -> None:
    model = disturbed(make(**TINY).double())
    x, _, condition = inputs(dtype=torch.float64)
    for edge in (ddpm_fractions()[0], ddpm_fractions()[-1]):
        below, above = (model(x, (edge + e).expand(2), condition).velocity for e in (-1e-9, 1e-9))
        torch.testing.assert_close(below, above, rtol=1e-4, atol=1e-4)


def test_conversion_is_precise_in_bfloat16() -> None:
    """1 − t is not rounded with the latent: at t = 0.99 in bfloat16 it would be 2^-6 or nothing."""
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    model, _ = oracle(noise.bfloat16())
    x = (0.5 * noise).bfloat16()
    velocity = model(x, torch.tensor([0.99]), Condition()).velocity
    assert velocity.dtype == torch.bfloat16
    expected = (noise.bfloat16().double() - x.double()) / 0.01
    torch.testing.assert_close(velocity.double(), expected, rtol=0.01, atol=0.1)


# ---------------------------------------------------------------------------------------------- as a backbone


def test_the_variance_is_a_fraction_beside_the_velocity() -> None:
    model, network = oracle(torch.zeros(1, 4, 4, 4))
    x, t = torch.ones(1, 4, 4, 4), torch.tensor([0.5])
    for output, fraction in ((-1.0, 0.0), (1.0, 1.0), (0.5, 0.75)):
        network.variance = output
        assert model(x, t, Condition()).variance.unique().tolist() == [fraction]


def test_the_velocity_does_not_read_the_variance() -> None:
    model = disturbed(make(**TINY))
    x, t, condition = inputs()
    before = model(x, t, condition)
    head = model.network.head
    rows = [cell * 8 + 4 + channel for cell in range(4) for channel in range(4)]
    with torch.no_grad():
        head.weight[rows] += 1.0
    after = model(x, t, condition)
    assert torch.equal(after.velocity, before.velocity)
    assert not torch.equal(after.variance, before.variance)


def test_training_reaches_the_noise_and_not_the_variance() -> None:
    model = make(**TINY)
    x, t, condition = inputs()
    model(x, t, condition).velocity.square().sum().backward()
    gradient = model.network.head.weight.grad.view(4, 2, 4, 32)
    assert bool((gradient[:, 0].abs().sum() > 0).all())
    assert float(gradient[:, 1].abs().max()) == 0.0


def test_starts_with_no_noise_predicted() -> None:
    model = make(**TINY)
    x, t, condition = inputs()
    torch.testing.assert_close(model(x, t, condition).velocity, -x / (1 - t)[:, None, None, None])
