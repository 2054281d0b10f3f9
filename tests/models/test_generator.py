"""The generator: guidance by a weaker model, paths, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from tests.models.test_folders import make_generator, make_tokenizer
from underpaint import Condition, ConfigError, DataError, LatentStatistics
from underpaint.config.component import ComponentConfig
from underpaint.config.diffusion import GuidanceConfig
from underpaint.models import generator as module
from underpaint.models.folders import save_generator, save_tokenizer
from underpaint.models.generator import Generator, SamplingSettings
from underpaint.registration.manager import manager

LABELS = torch.tensor([0, 2])
SEEDS = [3, 4]


def disturbed(seed: int = 0) -> Generator:
    """A generator whose velocity depends on its labels."""
    generator = make_generator()
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in (generator.backbone, generator.conditioner):
            for parameter in part.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))
    return generator


def settings(sampler: str = "euler", **guidance: object) -> SamplingSettings:
    options = {} if sampler == "adaptive" else {"steps": 3}
    return SamplingSettings(
        sampler=ComponentConfig(name=sampler, options=options),
        guidance=GuidanceConfig(**guidance),  # type: ignore[arg-type]
    )


def draw(generator: Generator, labels: torch.Tensor = LABELS, **how: object) -> torch.Tensor:
    return generator.latents(labels, seeds=SEEDS, settings=settings(**how))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weak") / "generator"
    save_generator(disturbed(1), folder)
    return folder


def test_a_weaker_model_guides_away_from_itself(weak: Path) -> None:
    generator, other = disturbed(0), disturbed(1)
    guided = draw(generator, scale=2.0, weak=str(weak))
    x = torch.stack([torch.randn((4, 4, 6), generator=torch.Generator().manual_seed(s)) for s in SEEDS])
    with torch.no_grad():
        for now in (1.0, 2 / 3, 1 / 3):
            t = torch.full((2,), now)
            main = generator.backbone(x, t, generator.conditioner(LABELS)).velocity
            away = other.backbone(x, t, other.conditioner(LABELS)).velocity
            x = x - (away + 2.0 * (main - away)) / 3
    torch.testing.assert_close(guided, x, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(guided, draw(generator, scale=2.0))


SAMPLERS = sorted({registration.name for registration in manager().catalogue.registrations("sampler")})


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_do_not_depend_on_how_they_are_batched(name: str) -> None:
    generator, labels, seeds = disturbed(0), torch.tensor([0, 1, 2, 0]), [7, 3, 5, 9]
    how = settings(name)
    whole = generator.latents(labels, seeds=seeds, settings=how)
    halves = [generator.latents(labels[i : i + 2], seeds=seeds[i : i + 2], settings=how) for i in (0, 2)]
    # The adaptive solver takes one error over the batch: its tolerance.
    atol = 1e-3 if name == "adaptive" else 1e-5
    torch.testing.assert_close(whole, torch.cat(halves), rtol=0, atol=atol)
    again = generator.latents(labels.flip(0), seeds=seeds[::-1], settings=how)
    torch.testing.assert_close(whole, again.flip(0), rtol=0, atol=atol)


def test_the_weaker_model_is_no_part_of_the_generator(weak: Path) -> None:
    generator = disturbed(0)
    before = set(generator.state_dict())
    draw(generator, scale=2.0, weak=str(weak))
    assert set(generator.state_dict()) == before


def test_without_guidance_the_weaker_model_is_neither_read_nor_recorded() -> None:
    how = SamplingSettings(guidance=GuidanceConfig(scale=1.0, weak="no/such/folder"))
    assert disturbed(0).protocol(how)["guidance"]["weak"] is None


def test_a_weaker_model_guided_by_itself_is_no_guidance(tmp_path: Path) -> None:
    generator = disturbed(0)
    save_generator(generator, tmp_path / "g")
    guided = draw(generator, scale=3.0, weak=str(tmp_path / "g"))
    torch.testing.assert_close(guided, draw(generator), rtol=1e-4, atol=1e-4)


def test_weaker_models_of_other_latents_or_data_are_refused(tmp_path: Path) -> None:
    generator = disturbed(0)
    save_tokenizer(make_tokenizer(), tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match="holds a tokenizer"):
        draw(generator, scale=2.0, weak=str(tmp_path / "tokenizer"))
    other = make_generator()
    other.tokenizer.statistics = LatentStatistics(mean=(0.5,) * 4, std=(1.0,) * 4, count=7, data="abc")
    save_generator(other, tmp_path / "statistics")
    with pytest.raises(ConfigError, match="other statistics"):
        draw(generator, scale=2.0, weak=str(tmp_path / "statistics"))
    other = make_generator()
    other.classes = ("x", "y", "z")
    save_generator(other, tmp_path / "classes")
    with pytest.raises(ConfigError, match="other classes"):
        draw(generator, scale=2.0, weak=str(tmp_path / "classes"))


def test_guidance_without_a_null_condition_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = disturbed(0)

    def none(batch: int, device: torch.device) -> Condition:
        raise NotImplementedError

    monkeypatch.setattr(generator.conditioner, "null", none)
    draw(generator, scale=1.0)
    with pytest.raises(ConfigError, match=r"conditioner 'labels' has no null condition.*guidance\.weak"):
        draw(generator, scale=2.0)


def test_too_many_channels_are_refused_before_anything_runs() -> None:
    generator = make_generator()
    with pytest.raises(ConfigError, match=r"guidance\.channels is 9, and the latent has 4"):
        draw(generator, scale=2.0, channels=9)
    with pytest.raises(ConfigError, match=r"guidance\.channels is 9"):
        Generator(
            generator.tokenizer, generator.backbone, generator.conditioner, grid=(4, 6), settings=settings(channels=9)
        )


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range_are_refused(label: int) -> None:
    with pytest.raises(DataError, match=f"label {label} .* labels are 0 to 2"):
        draw(make_generator(), torch.tensor([0, label]))


def test_texts_for_a_label_model_are_refused() -> None:
    with pytest.raises(DataError, match="'labels' takes labels, and was given texts"):
        make_generator().latents(["a fox", "a boat"], seeds=SEEDS)


@pytest.mark.parametrize(
    "labels", [[0, 1], 3, "fox", [], torch.ones(2), torch.zeros(1, 2, dtype=torch.int64), torch.tensor(0), LABELS[:0]]
)
def test_what_is_neither_labels_nor_texts_is_refused(labels: Any) -> None:
    generator = make_generator()
    for ask in (generator.sample, lambda inputs: generator.latents(inputs, seeds=SEEDS)):
        with pytest.raises(DataError, match="was given something else; give a tensor of integers, torch.tensor"):
            ask(labels)


def test_a_diverged_model_is_named() -> None:
    generator = make_generator()
    with torch.no_grad():
        for parameter in generator.backbone.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(DataError, match="not finite"):
        draw(generator)


def test_a_data_prediction_is_read_as_a_velocity() -> None:
    generator = disturbed(0)
    plain = draw(generator)
    other = Generator(
        generator.tokenizer,
        generator.backbone,
        generator.conditioner,
        grid=generator.grid,
        classes=generator.classes,
        path="linear",
        predicts="data",
    )
    # One Euler step from t = 1 to 0 of a data prediction ends at that prediction.
    one = SamplingSettings(sampler=ComponentConfig(name="euler", options={"steps": 1}))
    latents = other.latents(LABELS, seeds=SEEDS, settings=one)
    noise = torch.stack([torch.randn((4, 4, 6), generator=torch.Generator().manual_seed(s)) for s in SEEDS])
    with torch.no_grad():
        data = other.backbone(noise, torch.ones(2), other.conditioner(LABELS)).velocity
    torch.testing.assert_close(latents, data, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(latents, plain)


@pytest.mark.parametrize("sampler", ["euler", "heun", "ab2", "adaptive", "euler-maruyama", "ddim", "ddpm"])
def test_samples_repeat_with_every_sampler(sampler: str) -> None:
    generator = disturbed(0)
    first = draw(generator, sampler=sampler, scale=1.5)
    assert first.shape == (2, 4, 4, 6)
    assert torch.equal(first, draw(generator, sampler=sampler, scale=1.5))


def test_bf16_samples_are_near_those_in_fp32(weak: Path) -> None:
    how = {"scale": 2.0, "weak": str(weak)}
    wanted = draw(disturbed(0), **how)
    generator = disturbed(0)
    generator.prepare(precision="bf16")
    found = draw(generator, **how)
    assert found.dtype == torch.float32
    assert not torch.equal(found, wanted)
    # Eight significant bits, through three steps of a small network.
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_a_weaker_model_computes_as_the_generator_does(weak: Path) -> None:
    generator = disturbed(0)
    generator.prepare(precision="bf16")
    draw(generator, scale=2.0, weak=str(weak))
    (weaker,) = generator._weak.values()
    assert weaker.precision == "bf16"


def test_a_weaker_models_hash_is_that_of_its_file(weak: Path) -> None:
    how, generator = settings(scale=2.0, weak=str(weak)), disturbed(0)
    before = generator.protocol(how)["guidance"]
    rounded = disturbed(0)
    rounded.prepare(precision="bf16")
    draw(rounded, scale=2.0, weak=str(weak))
    assert rounded.protocol(how)["guidance"] == before


def test_what_is_rounded_cannot_be_prepared_otherwise() -> None:
    generator = disturbed(0)
    generator.prepare()
    generator.prepare(precision="bf16")
    with pytest.raises(ConfigError, match="prepared already, in bf16; load it again"):
        generator.prepare(precision="fp32")


def test_fp8_needs_a_device_that_has_it() -> None:
    with pytest.raises(ConfigError, match="no matrix products in 8 bits"):
        disturbed(0).prepare(precision="fp8")


def test_fp8_samples_are_near_those_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    # The CPU computes what a GPU's products would give.
    monkeypatch.setattr(module, "check_fp8", lambda _: None)
    wanted, generator = disturbed(0), disturbed(0)
    wanted.grid = generator.grid = (8, 8)
    generator.prepare(precision="fp8")
    expected, found = draw(wanted), draw(generator)
    assert not torch.equal(found, expected)
    # Four significant bits, through three steps of a small network.
    assert (found - expected).abs().max() < 0.2 * expected.abs().max()


def test_the_protocol_says_what_the_backbone_computed_in() -> None:
    generator = disturbed(0)
    assert generator.protocol()["precision"] == "fp32"
    generator.prepare(precision="bf16")
    assert generator.protocol()["precision"] == "bf16"


def test_the_protocol_has_every_setting(weak: Path, tmp_path: Path) -> None:
    generator = disturbed(0)
    every = [
        settings(),
        settings(sampler="heun"),
        settings(scale=2.0),
        settings(scale=2.0, channels=3),
        settings(scale=2.0, interval=(0.1, 1.0)),
        settings(scale=2.0, weak=str(weak)),
        attrs.evolve(settings(), sampler=ComponentConfig(name="euler", options={"steps": 4})),
    ]
    protocols = [generator.protocol(each) for each in every]
    assert all(a != b for i, a in enumerate(protocols) for b in protocols[:i])
    # A weaker model is known by its weights, not by where it lies.
    save_generator(disturbed(1), tmp_path / "copy")
    assert generator.protocol(settings(scale=2.0, weak=str(tmp_path / "copy"))) == protocols[5]
    save_generator(disturbed(2), tmp_path / "other")
    assert generator.protocol(settings(scale=2.0, weak=str(tmp_path / "other"))) != protocols[5]
