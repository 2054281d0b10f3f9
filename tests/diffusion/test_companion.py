"""A companion vector: as one tensor with its latent, its noise and target in training, guidance and sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from tests.diffusion.networks import Nothing, WithCompanion
from tests.models.test_folders import make_generator, make_tokenizer
from torch import Tensor, nn

import underpaint
from underpaint import Condition, ConfigError, DataError, Encoder, EncoderInfo, Features, Prediction
from underpaint.config.component import ComponentConfig
from underpaint.config.diffusion import DiffusionConfig, GuidanceConfig
from underpaint.config.losses import LossConfig
from underpaint.config.structure import structure
from underpaint.diffusion.companion import companion_maps, join, separate
from underpaint.diffusion.guidance import guided_field
from underpaint.diffusion.paths import PATHS, linear_velocity
from underpaint.interfaces.component import ComponentSpec
from underpaint.interfaces.loss import StepSizes
from underpaint.models.build import build_generator_parts
from underpaint.models.folders import load_folder, save_generator
from underpaint.models.generator import Generator, SamplingSettings
from underpaint.training.diffusion_stage import DiffusionModule, StepNoise, check_companion, diffusion_losses

CPU = torch.device("cpu")
SIZES = StepSizes(image=(24, 40), latent_channels=4, grid=(3, 5), hidden_width=1)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- one tensor


@pytest.mark.parametrize(("channels", "maps"), [(1, 1), (15, 1), (16, 2), (31, 3)])
def test_latent_and_vector_come_apart_again(channels: int, maps: int) -> None:
    latent, vector = randn(2, 4, 3, 5), randn(2, channels, seed=1)
    state = join(latent, vector)
    assert companion_maps(channels, (3, 5)) == maps
    assert state.shape == (2, 4 + maps, 3, 5)
    first, second = separate(state, channels)
    assert torch.equal(first, latent)
    assert torch.equal(second, vector)
    assert float(state.abs().sum()) == pytest.approx(float(latent.abs().sum() + vector.abs().sum()), rel=1e-6)


def test_without_a_companion_there_are_no_maps() -> None:
    assert companion_maps(0, (3, 5)) == 0


# ---------------------------------------------------------------------------------------------------- guidance


class Pair(WithCompanion):
    """Velocities that depend on latent, vector, time and condition in ways that are easy to write down."""

    def answer(self, latent: Tensor, vector: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        assert condition.pooled is not None
        pooled = condition.pooled.mean(1)
        return (
            0.3 * latent + (t + pooled + vector.mean(1)).view(-1, 1, 1, 1),
            0.5 * vector + (latent.mean((1, 2, 3)) * pooled)[:, None],
        )


CONDITION, NULL = (Condition(pooled=randn(2, 3, seed=seed)) for seed in (5, 6))


def test_channels_limit_the_latent_and_not_the_vector() -> None:
    latent, vector, t = randn(2, 4, 3, 5), randn(2, 7, seed=1), torch.tensor([0.3, 0.8])
    config = GuidanceConfig(scale=3.0, channels=2)
    field = guided_field(linear_velocity(Pair(), "linear", "velocity"), CONDITION, config, null=NULL, companion=1)
    guided, guided_vector = separate(field(join(latent, vector), t), 7)
    yes, no = (Pair()(latent, t, condition, companion=vector) for condition in (CONDITION, NULL))
    torch.testing.assert_close(guided[:, :2], (3 * yes.velocity - 2 * no.velocity)[:, :2])
    torch.testing.assert_close(guided[:, 2:], yes.velocity[:, 2:])
    torch.testing.assert_close(guided_vector, 3 * yes.companion - 2 * no.companion)


class Perfect(WithCompanion):
    """Knows data and noise, and answers what it was trained for; its states are checked."""

    def __init__(self, path: Any, predicts: Any) -> None:
        super().__init__()
        self.path, self.predicts = PATHS[path], predicts

    def answer(self, latent: Tensor, vector: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        both = [(randn(2, 4, 3, 5, seed=s), randn(2, 7, seed=s + 10)) for s in (0, 1)]
        for state, x0, noise in zip((latent, vector), *both, strict=True):
            torch.testing.assert_close(state, self.path.mix(x0, noise, t), rtol=1e-4, atol=1e-4)
        first, second = (self.path.quantity(self.predicts, x0, noise, t) for x0, noise in zip(*both, strict=True))
        return first, second


@pytest.mark.parametrize("path", ["linear", "cosine", "vp"])
@pytest.mark.parametrize("predicts", ["velocity", "noise", "data"])
def test_a_perfect_network_of_any_path_gives_both_linear_velocities(path: Any, predicts: Any) -> None:
    t = torch.tensor([0.3, 0.7])
    (x0, c0), (noise, c1) = ((randn(2, 4, 3, 5, seed=s), randn(2, 7, seed=s + 10)) for s in (0, 1))
    wide = t.view(-1, 1, 1, 1)
    state = join((1 - wide) * x0 + wide * noise, (1 - t[:, None]) * c0 + t[:, None] * c1)
    found, vector = separate(linear_velocity(Perfect(path, predicts), path, predicts)(state, t, Condition()), 7)
    torch.testing.assert_close(found, noise - x0, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(vector, c1 - c0, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------- sampling


def reg(seed: int = 0, companion: int = 9) -> Generator:
    tokenizer = make_tokenizer()
    backbone = {"name": "reg/S-1", "width": 32, "depth": 1, "heads": 2, "companion": companion}
    config = structure({"backbone": backbone, "conditioner": "labels", "steps": 1}, DiffusionConfig, "diffusion")
    network, conditioner = build_generator_parts(config, tokenizer, grid=(4, 6), classes=3, has_text=False, seed=0)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (*network.parameters(), *conditioner.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=source))
    return Generator(tokenizer, network, conditioner, grid=(4, 6), classes=("a", "b", "c")).eval()


LABELS, SEEDS = torch.tensor([0, 2]), [3, 4]


def settings(name: str = "euler", guidance: dict[str, Any] | None = None, **options: Any) -> SamplingSettings:
    return SamplingSettings(
        sampler=ComponentConfig(name=name, options=options), guidance=GuidanceConfig(**(guidance or {}))
    )


def by_hand(generator: Generator, scale: float, steps: int = 3) -> Tensor:
    """Euler's method for latent and vector apart, both guided."""
    sources = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    # The latent's noise is what a generator without companion draws.
    x = torch.stack([torch.randn((4, 4, 6), generator=source) for source in sources])
    c = torch.stack([torch.randn(generator.backbone.companion, generator=source) for source in sources])
    network, conditioner = generator.backbone, generator.conditioner
    for index in range(steps):
        t = torch.full((2,), 1 - index / steps)
        yes = network(x, t, conditioner(LABELS), companion=c)
        no = network(x, t, conditioner.null(2, CPU), companion=c)
        x = x - (no.velocity + scale * (yes.velocity - no.velocity)) / steps
        c = c - (no.companion + scale * (yes.companion - no.companion)) / steps
    return x


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_latent_and_vector_are_denoised_together(scale: float) -> None:
    generator = reg()
    found = generator.latents(LABELS, seeds=SEEDS, settings=settings(guidance={"scale": scale}, steps=3))
    with torch.no_grad():
        torch.testing.assert_close(found, by_hand(generator, scale), rtol=1e-4, atol=1e-4)
    assert found.shape == (2, 4, 4, 6)


@pytest.mark.parametrize("sampler", ["heun", "ab2", "euler-maruyama", "ddim", "ddpm", "adaptive"])
def test_every_solver_carries_both(sampler: str) -> None:
    options = {"rtol": 1e-2, "atol": 1e-2} if sampler == "adaptive" else {"steps": 4}
    generator = reg()
    found = generator.latents(LABELS, seeds=SEEDS, settings=settings(sampler, {"scale": 2.0}, **options))
    assert found.shape == (2, 4, 4, 6)
    if sampler != "adaptive":  # whose steps depend on the batch
        alone = generator.latents(LABELS[1:], seeds=SEEDS[1:], settings=settings(sampler, {"scale": 2.0}, **options))
        torch.testing.assert_close(found[1:], alone, rtol=1e-4, atol=1e-4)


def test_shifts_by_tokens_see_the_grid_and_not_the_vector() -> None:
    # 24 tokens: α = √(24/256), also with a companion beside them.
    generator = reg()
    by_rule = generator.latents(LABELS, seeds=SEEDS, settings=settings(steps=4, shift="tokens"))
    by_number = generator.latents(LABELS, seeds=SEEDS, settings=settings(steps=4, shift=(24 / 256) ** 0.5))
    assert torch.equal(by_rule, by_number)


def test_other_grids_are_sampled_too() -> None:
    found = reg().latents(LABELS, seeds=SEEDS, settings=settings(steps=2), grid=(2, 3))
    assert found.shape == (2, 4, 2, 3)


def test_it_comes_back_from_its_folder(tmp_path: Path) -> None:
    generator = reg()
    save_generator(generator, tmp_path / "g")
    loaded = load_folder(tmp_path / "g")
    assert isinstance(loaded, Generator)
    how = settings(guidance={"scale": 2.0}, steps=3)
    assert torch.equal(
        generator.latents(LABELS, seeds=SEEDS, settings=how), loaded.latents(LABELS, seeds=SEEDS, settings=how)
    )


def test_a_weaker_model_needs_the_same_companion(tmp_path: Path) -> None:
    generator = reg()
    for name, other in (("same", reg(1)), ("wider", reg(1, companion=10)), ("none", make_generator())):
        other.tokenizer = generator.tokenizer
        save_generator(other, tmp_path / name)
    guided = {"scale": 2.0, "weak": str(tmp_path / "same")}
    found = generator.latents(LABELS, seeds=SEEDS, settings=settings(guidance=guided, steps=2))
    plain = generator.latents(LABELS, seeds=SEEDS, settings=settings(steps=2))
    weak = reg(1)
    x = torch.stack([torch.randn((4, 4, 6), generator=torch.Generator().manual_seed(s)) for s in SEEDS])
    assert not torch.allclose(found, plain)
    assert found.shape == x.shape
    assert weak.backbone.companion == generator.backbone.companion
    for name, has in (("wider", "10 channels"), ("none", "none")):
        guided = {"scale": 2.0, "weak": str(tmp_path / name)}
        with pytest.raises(ConfigError, match=f"companion vector has {has} where this generator's has 9 channels"):
            generator.latents(LABELS, seeds=SEEDS, settings=settings(guidance=guided, steps=2))


# ---------------------------------------------------------------------------------------------------- training


def config(companion: str | None = "tiny/vit@random", **changes: Any) -> DiffusionConfig:
    losses = (LossConfig(name="velocity"), *([LossConfig(name="companion", weight=0.03)] if companion else []))
    settings = {
        "backbone": ComponentConfig(name="reg/S-1"),
        "conditioner": ComponentConfig(name="labels"),
        "losses": losses,
        "steps": 1,
        "companion": None if companion is None else ComponentConfig(name=companion),
    }
    return DiffusionConfig(**{**settings, **changes})


def test_its_noise_leaves_the_other_draws_as_they_are() -> None:
    alone, both = (StepNoise(config(batch=8), (4, 3, 5), 0, CPU, companion=count) for count in (0, 7))
    for rows in (slice(0, 8), slice(2, 4)):
        for first, second in zip(alone.rows(3, rows), both.rows(3, rows), strict=True):
            assert torch.equal(first, second)
    whole = both.companion(3, slice(0, 8))
    assert whole.shape == (8, 7)
    assert torch.equal(both.companion(3, slice(2, 4)), whole[2:4])
    assert not torch.equal(both.companion(4, slice(0, 8)), whole)
    # A second object, as after a restart.
    assert torch.equal(StepNoise(config(batch=8), (4, 3, 5), 0, CPU, companion=7).companion(3, slice(0, 8)), whole)


class Scaled(WithCompanion):
    """Multiples of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.7))

    def answer(self, latent: Tensor, vector: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        return self.factor * latent, 2 * self.factor * vector


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("predicts", ["velocity", "data"])
def test_the_loss_is_that_of_both_velocities(path: Any, predicts: Any) -> None:
    x0, noise, c0, c1 = randn(2, 4, 3, 5), randn(2, 4, 3, 5, seed=1), randn(2, 7, seed=2), randn(2, 7, seed=3)
    t = torch.tensor([0.2, 0.9])
    losses = diffusion_losses(config(), CPU, SIZES)
    module = DiffusionModule(Scaled(), Nothing(), losses, path=path, predicts=predicts)
    labels, drop = torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.bool)
    loss, terms = module(x0, labels, noise, t, drop, 0, companion=(c0, c1))
    angle = torch.pi / 2 * t.double()
    cosine = (torch.cos(angle), torch.sin(angle), -torch.pi / 2 * torch.sin(angle), torch.pi / 2 * torch.cos(angle))
    one = torch.ones_like(angle)
    a, s, da, ds = cosine if path == "cosine" else (1 - t.double(), t.double(), -one, one)
    state = a[:, None] * c0 + s[:, None] * c1
    target = c0.double() if predicts == "data" else da[:, None] * c0 + ds[:, None] * c1
    wanted = float((1.4 * state - target).square().mean())
    assert float(terms["companion"]) == pytest.approx(wanted, rel=1e-5)
    assert float(loss.detach()) == pytest.approx(float(terms["velocity"]) + 0.03 * wanted, rel=1e-5)


def test_losses_get_the_images() -> None:
    loss = LossConfig(
        name="repa",
        options={
            "encoder": "tiny/vit@random",
            "options": {"width": 16, "depth": 1, "heads": 2},
            "layer": 0,
            "projector": 8,
        },
    )
    losses = diffusion_losses(config(None, losses=(loss,)), CPU, SIZES)
    assert losses.needs == {"inputs", "prediction"}


def test_a_companion_that_no_loss_trains_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"none of diffusion\.losses trains the companion; add \{name: companion"):
        diffusion_losses(config(losses=(LossConfig(name="velocity"),)), CPU, SIZES)


def test_its_loss_without_a_companion_is_refused() -> None:
    with pytest.raises(ConfigError, match="the loss 'companion' needs companion_target, which this stage does not"):
        diffusion_losses(config(None, losses=(LossConfig(name="companion"),)), CPU, SIZES)


class Summary(Encoder):
    """Gives some pooled features, or none."""

    spec = ComponentSpec(kind="encoder", name="summary", options={}, context={}, plugin="test", distribution="test 1")

    def __init__(self, channels: int | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels or 1))
        self.channels = channels
        self.info = EncoderInfo(
            channels=(4,),
            stride=8,
            patch=8,
            native_size=(32, 32),
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            layers=(0,),
            licence="none",
            source="none",
        )

    def forward(self, images: Tensor) -> Features:
        pooled = None if self.channels is None else self.weight.expand(len(images), -1)
        return Features((images.new_zeros(len(images), 4, 1, 1),), pooled)


def test_companions_that_do_not_fit_are_refused() -> None:
    network = Pair()
    check_companion("pair", network, Summary(7), (24, 40))
    with pytest.raises(
        ConfigError, match=r"'pair' denoises a companion vector of 7 channels; set diffusion\.companion"
    ):
        check_companion("pair", network, None, (24, 40))
    with pytest.raises(ConfigError, match=r"pooled features of 8 channels.*a companion of 7; choose an encoder that"):
        check_companion("pair", network, Summary(8), (24, 40))
    with pytest.raises(ConfigError, match="'summary', which has no pooled features"):
        check_companion("pair", network, Summary(None), (24, 40))
    with pytest.raises(DataError, match="25×40 px do not divide"):
        check_companion("pair", network, Summary(7), (25, 40))
    plain = make_generator().backbone
    check_companion("sit", plain, None, (24, 40))
    with pytest.raises(ConfigError, match="the backbone 'sit' has no companion vector; remove it"):
        check_companion("sit", plain, Summary(7), (24, 40))


def test_the_loss_names_what_is_missing() -> None:
    loss: Any = underpaint.create("loss", "companion")
    step = underpaint.StepTensors(step=0, prediction=Prediction(randn(2, 4, 3, 5)), companion_target=randn(2, 7))
    with pytest.raises(DataError, match="the backbone predicts none; remove the loss"):
        loss(step)
    given = attrs.evolve(step, prediction=Prediction(randn(2, 4, 3, 5), companion=step.companion_target + 0.5))
    assert float(loss(given)["companion"]) == pytest.approx(0.25)
