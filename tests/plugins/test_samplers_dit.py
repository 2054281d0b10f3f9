"""DiT's sampler, DDPM with respaced timesteps and a learned variance, against the papers' formulas in float64."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.test_folders import make_tokenizer
from tests.plugins import backbones
from tests.plugins.backbones import disturbed
from tests.plugins.test_samplers import NOISE, gaussian, make, no_noise
from tests.plugins.test_samplers_random import source
from torch import Tensor, nn

import underpaint
from underpaint import Backbone, Condition, ConfigError, Prediction, VarianceField
from underpaint.config.component import ComponentConfig
from underpaint.config.diffusion import GuidanceConfig
from underpaint.diffusion.guidance import guided_field
from underpaint.diffusion.paths import linear_velocity
from underpaint.models.generator import Generator, SamplingSettings
from underpaint_samplers.schedule import respaced

LEARNED: dict[str, Any] = {"schedule": "discrete", "variance": "learned"}
dit = partial(backbones.make, "dit/S-2", **backbones.TINY["dit/S-2"])


class Sensible(nn.Module):
    """A DiT's network with the noise of data N(0, 1), √(1 − ᾱ)·x, and √ᾱ of its own beside: samples stay moderate."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, condition: Condition, layers: Any = ()) -> Prediction:
        noise, variance = self.network(x, t, condition).velocity.chunk(2, dim=1)
        kept = np.exp(np.interp(t.numpy(), np.arange(1000), np.log(table())))
        kept = torch.from_numpy(kept)[:, None, None, None]
        return Prediction(torch.cat(((1 - kept).sqrt() * x + kept.sqrt() * noise, variance), dim=1))


def sensible() -> Any:
    model = disturbed(dit()).double()
    model.network = Sensible(model.network)
    return model


def table() -> np.ndarray:
    """ᾱ of the 1000 timesteps."""
    return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def timesteps(count: int) -> list[int]:
    return [round(number - 1) for number in np.linspace(1, 1000, count).tolist()]


def by_the_papers(network: Any, x: Tensor, fresh: Any, steps: int, *, eta: float | None = None) -> Tensor:
    """DDPM over respaced timesteps; or DDIM (Song, Meng & Ermon 2021, eq. 12) with an η.

    `network` gives noise and fraction for a latent of unit variance at a timestep.
    """
    chosen = timesteps(steps)
    for index in reversed(range(steps)):
        kept = table()[chosen[index]]
        before = table()[chosen[index - 1]] if index else 1.0
        beta = 1 - kept / before
        smallest = (1 - before) / (1 - kept) * beta
        noise, fraction = network(x, chosen[index])
        x0 = (x - math.sqrt(1 - kept) * noise) / math.sqrt(kept)
        if eta is None:
            # Ho et al. 2020, eq. 7; Nichol & Dhariwal 2021, eq. 15. The last step is the mean.
            mean = math.sqrt(before) * beta / (1 - kept) * x0 + math.sqrt(1 - beta) * (1 - before) / (1 - kept) * x
            if index == 0:
                return mean
            x = mean + torch.exp(fraction * math.log(beta) + (1 - fraction) * math.log(smallest)).sqrt() * fresh()
        else:
            deviation = eta * math.sqrt(smallest)
            x = math.sqrt(before) * x0 + math.sqrt(1 - before - deviation**2) * noise
            if eta > 0.0 and index:
                x = x + deviation * fresh()
    return x


def own_terms(model: Any, condition: Condition, null: Condition | None = None, scale: float = 1.0) -> Any:
    """What DiT's network says, with its guidance: of the noise of the first three channels, by the null condition."""

    def run(x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        times = torch.full((len(x),), step)
        noise, variance = model.network(x, times, condition).velocity.chunk(2, dim=1)
        if null is not None:
            other = model.network(x, times, null).velocity.chunk(2, dim=1)[0]
            guided = other + scale * (noise - other)
            noise = torch.cat((guided[:, :3], noise[:, 3:]), dim=1)
        return noise, (variance + 1) / 2

    return run


def pooled(seed: int) -> Condition:
    return Condition(pooled=torch.randn(2, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def wide_source(seed: int) -> Any:
    fresh = source((2, 4, 4, 4), seed)
    return lambda: fresh().double()


def test_timesteps_are_those_of_the_paper() -> None:
    fractions = respaced(1000)
    ratio = np.sqrt(1 / table() - 1)
    np.testing.assert_allclose(fractions[::-1], ratio / (1 + ratio), rtol=1e-9)
    # 250 of 1000 lie 999/249 = 4.012 apart: one gap of five in each 83.
    chosen = timesteps(250)
    assert (chosen[:3], chosen[-1], len(set(chosen))) == ([0, 4, 8], 999, 250)
    assert np.bincount(np.diff(chosen)).tolist() == [0, 0, 0, 0, 246, 3]
    for steps in (2, 3, 50, 250, 999):
        assert respaced(steps) == [fractions[999 - step] for step in reversed(timesteps(steps))]


@pytest.mark.parametrize(("steps", "scale"), [(250, 1.0), (25, 4.0)])
def test_learned_variance_of_dit_with_its_guidance(steps: int, scale: float) -> None:
    model, condition, null = sensible(), pooled(3), pooled(4)
    guidance = GuidanceConfig(scale=scale, channels=3)
    start = wide_source(0)()
    velocity = linear_velocity(model, "linear", "velocity")
    field = guided_field(velocity, condition, guidance, null=null, variance=True)
    sampler = make("ddpm", steps=steps, **LEARNED)
    with torch.no_grad():
        found = sampler.sample(field, start, wide_source(1))
        wanted = by_the_papers(own_terms(model, condition, null, scale), start, wide_source(1), steps)
        posterior = make("ddpm", steps=steps, schedule="discrete").sample(field, start, wide_source(1))
    # The time reaches the network in float32.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert float((found - posterior).abs().max()) > 0.05


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_of_dit(eta: float) -> None:
    model, condition = sensible(), pooled(3)
    start = wide_source(0)()
    field = guided_field(linear_velocity(model, "linear", "velocity"), condition, GuidanceConfig(), variance=True)
    with torch.no_grad():
        found = make("ddim", steps=20, schedule="discrete", eta=eta).sample(field, start, wide_source(1))
        wanted = by_the_papers(own_terms(model, condition), start, wide_source(1), 20, eta=eta)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", ["continuous", "discrete"])
def test_the_lower_bound_is_the_posterior_and_the_upper_one_is_larger(schedule: str) -> None:
    def deviation(fraction: float | None) -> Tensor:
        noise, zero = torch.ones_like(NOISE), torch.zeros_like(NOISE)
        field = VarianceField(lambda x, t: (torch.zeros_like(x), torch.full_like(x, fraction or 0.0)))
        variance = "posterior" if fraction is None else "learned"
        # What three steps make of noise alone, added at two points.
        return make("ddpm", steps=3, schedule=schedule, variance=variance).sample(field, zero, lambda: noise)

    torch.testing.assert_close(deviation(0.0), deviation(None), rtol=1e-12, atol=0)
    assert bool((deviation(1.0) > deviation(0.5)).all() and (deviation(0.5) > deviation(0.0)).all())


def test_steps_of_the_upper_bound_add_the_variance_beta() -> None:
    # Two timesteps, 999 and 0: β = 1 − ᾱ_999/ᾱ_0. With a velocity of zero, a state of zero stays.
    field = VarianceField(lambda x, t: (torch.zeros_like(x), torch.ones_like(x)))
    last = make("ddpm", steps=2, **LEARNED).sample(field, torch.zeros_like(NOISE), lambda: torch.ones_like(NOISE))
    first = table()[0]
    expected = math.sqrt(1 - table()[999] / first) / (math.sqrt(first) + math.sqrt(1 - first))
    assert last.unique().tolist() == pytest.approx([expected], rel=1e-9)


def test_other_solvers_see_the_velocity_alone() -> None:
    field = VarianceField(lambda x, t: (gaussian(x, t), torch.full_like(x, math.nan)))
    for name in ("euler", "heun", "ab2", "ddim"):
        sampler = make(name, steps=5)
        torch.testing.assert_close(sampler.sample(field, NOISE, no_noise), sampler.sample(gaussian, NOISE, no_noise))


@pytest.mark.parametrize(("path", "predicts"), [("vp", "noise"), ("cosine", "data")])
def test_a_variance_passes_the_conversion_of_paths(path: Any, predicts: Any) -> None:
    model: Backbone = disturbed(dit())
    x, t, condition = backbones.inputs()
    model.variance = False
    plain = linear_velocity(model, path, predicts)(x, t, condition)
    model.variance = True
    both = linear_velocity(model, path, predicts)(x, t, condition)
    assert torch.equal(both[:, :4], plain)
    assert both.shape == (2, 8, 4, 4)


def generator(backbone: str = "dit/S-2") -> Generator:
    tokenizer = make_tokenizer()
    context = {"latent_channels": 4, "grid": (4, 6), "pooled_dim": 32, "token_dim": 0}
    network = underpaint.create("backbone", backbone, **context, **backbones.TINY[backbone])
    conditioner = underpaint.create("conditioner", "labels", width=32, classes=3)
    return Generator(tokenizer, disturbed(network), disturbed(conditioner), grid=(4, 6)).eval()


def how(**guidance: Any) -> SamplingSettings:
    sampler = ComponentConfig(name="ddpm", options={"steps": 4, **LEARNED})
    return SamplingSettings(sampler=sampler, guidance=GuidanceConfig(**guidance))


@pytest.mark.parametrize("guidance", [{}, {"scale": 2.0}, {"scale": 2.0, "channels": 3, "interval": (0.1, 0.8)}])
def test_generators_of_dit_sample_so_whatever_the_batch(guidance: dict[str, Any]) -> None:
    made, labels = generator(), torch.tensor([0, 1, 2])
    drawn = made.latents(labels, seeds=[3, 4, 5], settings=how(**guidance))
    alone = made.latents(labels[1:2], seeds=[4], settings=how(**guidance))
    torch.testing.assert_close(drawn[1:2], alone, rtol=1e-3, atol=1e-3)
    facts = made.protocol(how())["sampler"]
    assert (facts["schedule"], facts["variance"], facts["evaluations"]) == ("discrete", "learned", 4)


def test_a_backbone_without_variance_is_refused() -> None:
    with pytest.raises(ConfigError, match="the backbone gives none"):
        generator("sit/S-2").latents(torch.tensor([0]), seeds=[3], settings=how())


@pytest.mark.parametrize(
    "options",
    [
        {"variance": "learned", "eta": 0.5},
        {"schedule": "discrete", "steps": 1},
        {"schedule": "discrete", "steps": 1001},
        {"schedule": "discrete", "shift": 2.0},
    ],
)
def test_contradictory_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="set "):
        make("ddpm", **options)
