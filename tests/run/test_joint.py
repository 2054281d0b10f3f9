"""Stages that tune tokenizer and diffusion model together (REPA-E): whole runs, interrupted, handed on, refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import yaml

import underpaint
from tests.run.conftest import TINY
from tests.run.test_launch import finish, train
from tests.run.test_stages import PATCHGAN, Cut, cut
from underpaint.config.component import ComponentConfig
from underpaint.config.recipe import apply_overrides, plain_recipe, recipe_from_plain
from underpaint.config.schema import Recipe
from underpaint.errors import ConfigError, NotFoundError
from underpaint.models.build import build_tokenizer
from underpaint.models.folders import save_tokenizer
from underpaint.models.generator import Generator
from underpaint.models.tokenizer import Tokenizer
from underpaint.run import diffusion_stage
from underpaint.run.pipeline import run_recipe
from underpaint.run.recipes import check_recipe, load_recipe
from underpaint.training.diffusion_stage import StepNoise
from underpaint.training.log import read_rows
from underpaint.weights import tensor_hash

REPA: dict[str, Any] = {
    "name": "repa",
    "weight": 0.5,
    "encoder": "tiny/vit@random",
    "options": {"width": 32, "depth": 2, "heads": 2},
    "layer": 0,
    "projector": 16,
}
BACKBONE = {"name": "sit/S-1", "width": 32, "depth": 2, "heads": 2}
JOINT: dict[str, Any] = {
    "name": "joint",
    "trains": ["encoder", "adapter", "decoder"],
    "losses": ["l1", {**PATCHGAN, "start": 1}],
    "denoiser": {"backbone": BACKBONE, "conditioner": "labels", "losses": ["velocity", REPA]},
    "steps": 4,
    "batch": 8,
    "ema": 0.5,
}
DECODE = {"name": "refine", "trains": ["decoder"], "losses": ["l1"], "steps": 1, "batch": 8, "ema": None}


def recipe(*overrides: str, stages: tuple[dict[str, Any], ...] = (JOINT,), diffusion: bool = False) -> Recipe:
    plain = copy.deepcopy(TINY)
    plain["stages"] = copy.deepcopy(list(stages))
    plain["diffusion"] = {**plain["diffusion"], "steps": 2, "start": "joint"} if diffusion else None
    return recipe_from_plain(apply_overrides(plain, overrides))


def generator(out: Path) -> Generator:
    found = underpaint.load(out / "stages" / "joint" / "generator")
    assert isinstance(found, Generator)
    return found


def tokenizer(out: Path, stage: str = "joint") -> Tokenizer:
    found = underpaint.load(out / "stages" / stage / "tokenizer")
    assert isinstance(found, Tokenizer)
    return found


def measured(out: Path, *names: str) -> list[list[float]]:
    return [[row[name] for name in names] for row in read_rows(out / "stages" / "joint" / "metrics.jsonl")]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: joint, then the decoder alone. Tests read it and never write into it."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    run_recipe(recipe(stages=(JOINT, DECODE)), out)
    return out


# ------------------------------------------------------------------------------------------------ whole runs


def test_terms_of_both_sides_are_trained_and_logged(tuned: Path) -> None:
    rows = read_rows(tuned / "stages" / "joint" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        adversarial = PATCHGAN["weight"] * row.get("adversarial", 0.0)
        parts = row["l1"] + adversarial + row["velocity"] + 0.5 * row["repa"] + 1.5 * row["alignment"]
        assert row["loss"] == pytest.approx(parts, rel=1e-4)
        assert {"critic_real", "critic_fake"} <= row.keys()
        assert any(key.startswith("loss_t/") for key in row)


def test_it_leaves_a_tokenizer_and_a_generator_of_the_same_latents(tuned: Path) -> None:
    made, alone = generator(tuned), tokenizer(tuned)
    assert made.tokenizer.fingerprint() == alone.fingerprint()
    assert tensor_hash(made.tokenizer.state_dict()) == tensor_hash(alone.state_dict())
    assert {name.split(".")[0] for name in made.state_dict()} == {"tokenizer", "backbone", "conditioner"}
    assert not any("projector" in name for name in made.state_dict())
    start = build_tokenizer(recipe().tokenizer, recipe().seed)
    for part in ("encoder", "adapter", "decoder"):
        before, after = getattr(start, part).state_dict(), getattr(alone, part).state_dict()
        assert tensor_hash(before) != tensor_hash(after), part
    images = made.sample(torch.tensor([0, 1]), seeds=[5, 6])
    assert images.shape == (2, 3, 32, 32)
    about = json.loads((tuned / "stages" / "joint" / "tokenizer" / "config.json").read_text())["about"]
    assert "joint: encoder + adapter + decoder with sit/S-1 for 4 steps of 8" in about["facts"][0]


def test_statistics_are_those_of_the_norm_and_last_as_long_as_the_latents(tuned: Path) -> None:
    found = tokenizer(tuned).statistics
    assert found is not None
    assert found.grid is None
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    # Of other images and of weights that moved on meanwhile: of the same size, no more.
    std = tokenizer(tuned).encode(images).std((0, 2, 3))
    assert all(0.1 < a / b < 10 for a, b in zip(found.std, std.tolist(), strict=True))
    assert tokenizer(tuned, "refine").statistics == found


def test_statistics_go_when_the_latents_change(tuned: Path, tmp_path: Path) -> None:
    later = {**DECODE, "trains": ["adapter"]}
    run_recipe(
        recipe(f"tokenizer={{load: {tuned / 'stages' / 'joint' / 'tokenizer'}}}", stages=(later,)), tmp_path / "run"
    )
    assert tokenizer(tmp_path / "run", "refine").statistics is None


@pytest.mark.parametrize("zero", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_interrupted_training_goes_on_bit_by_bit(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero: int
) -> None:
    whole, config = tuned, recipe(f"engine.zero={zero}", stages=(JOINT, DECODE))
    if zero:
        whole = tmp_path / "whole"
        run_recipe(config, whole)
    cut(monkeypatch, "joint", 2)
    with pytest.raises(Cut):
        run_recipe(config, tmp_path / "run", until="joint")
    assert not (tmp_path / "run" / "stages" / "joint" / "generator").exists()
    run_recipe(config, tmp_path / "run", until="joint")
    assert tensor_hash(generator(tmp_path / "run").state_dict()) == tensor_hash(generator(whole).state_dict())
    assert tokenizer(tmp_path / "run").statistics == tokenizer(whole).statistics
    terms = ("loss", "alignment", "repa", "velocity", "critic_fake", "grad_norm")
    assert measured(tmp_path / "run", *terms) == measured(whole, *terms)


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one(tmp_path: Path) -> None:
    stage = {**JOINT, "losses": ["l1"]}
    run_recipe(recipe("stages.joint.denoiser.dropout=0.5", stages=(stage,)), tmp_path / "one")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(plain_recipe(recipe("stages.joint.denoiser.dropout=0.5", stages=(stage,)))))
    process = train(file, tmp_path / "two", "engine.zero=1", ranks=2, until="joint")
    error = finish(process)
    assert process.returncode == 0, error
    terms = ("loss", "alignment", "repa", "velocity", "grad_norm")
    np.testing.assert_allclose(measured(tmp_path / "two", *terms), measured(tmp_path / "one", *terms), rtol=2e-3)


def test_every_micro_batch_has_its_own_rows_of_the_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    real = StepNoise.rows

    def rows(self: StepNoise, step: int, part: slice) -> Any:
        asked.append((step, part.start, part.stop))
        return real(self, step, part)

    monkeypatch.setattr(StepNoise, "rows", rows)
    run_recipe(recipe("engine.accumulation=2", "stages.joint.steps=2", "stages.joint.losses=[l1]"), tmp_path / "run")
    # The first is of the single image that the arithmetic is counted with.
    assert asked == [(0, 0, 1), (0, 0, 4), (0, 4, 8), (1, 0, 4), (1, 4, 8)]


# ------------------------------------------------------------------------------------------- from there on


def test_the_diffusion_stage_goes_on_from_the_denoiser(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, str] = {}
    real = diffusion_stage.train_stage

    def look(session: Any, plan: Any) -> Any:
        for part in ("backbone", "conditioner"):
            seen[part] = tensor_hash(getattr(plan.module, part).state_dict())
        return real(session, plan)

    monkeypatch.setattr(diffusion_stage, "train_stage", look)
    run_recipe(recipe(stages=(JOINT, DECODE), diffusion=True), tmp_path / "run")
    kept = generator(tuned)
    assert seen == {part: tensor_hash(getattr(kept, part).state_dict()) for part in ("backbone", "conditioner")}
    facts = json.loads((tmp_path / "run" / "generator" / "config.json").read_text())["about"]["facts"]
    assert facts == ["sit/S-1 trained for 2 steps of 8, from where stage joint left it."]

    other = recipe("diffusion.backbone.depth=1", stages=(JOINT, DECODE), diffusion=True)
    run_recipe(recipe(stages=(JOINT,)), tmp_path / "other")
    (tmp_path / "other" / "config.yaml").write_text(yaml.safe_dump(plain_recipe(other)))
    with pytest.raises(
        ConfigError, match="diffusion.start is 'joint', whose backbone differs from that of 'diffusion'"
    ):
        run_recipe(other, tmp_path / "other")


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine.zero=3"], r"stages\[0\] has a denoiser, and engine.zero is 3"),
        (["stages.joint.trains=[decoder]"], "whose alignment trains encoder and adapter, and trains only decoder"),
        (["stages.joint.equivariance.scales=[0.5, 1.0]"], "equivariance.input is 0.25, which shrinks images"),
        (["stages.joint.denoiser.alignment=0"], "alignment"),
        (["stages.joint.denoiser.momentum=1.5"], "momentum"),
        (["stages.joint.denoiser.steps=5"], r"stages\[0\].denoiser has no key 'steps'"),
        (["diffusion.start=align"], "'align', which is no stage that trains a denoiser; those that do: joint"),
    ],
)
def test_what_cannot_be_is_refused_when_the_recipe_is_read(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(*overrides, diffusion=True)


@pytest.mark.parametrize("part", ["backbone", "conditioner"])
def test_its_components_are_looked_up_when_the_recipe_is_read(part: str) -> None:
    with pytest.raises(NotFoundError, match=rf"stages\[0\]\.denoiser\.{part}: There is no {part} 'nonsense'"):
        check_recipe(recipe(f"stages.joint.denoiser.{part}=nonsense"))
    with pytest.raises(NotFoundError, match=r"stages\[0\]\.denoiser\.losses\[0\]: There is no loss"):
        check_recipe(recipe("stages.joint.denoiser.losses=[nonsense]"))


TEXT = "stages.joint.denoiser.conditioner={name: text/open_clip, model: ViT-S-32-alt, weights: random}"


@pytest.mark.slow
def test_texts_condition_it(tmp_path: Path) -> None:
    run_recipe(recipe("stages.joint.steps=2", TEXT), tmp_path / "run")
    assert generator(tmp_path / "run").sample(["a red circle"], seeds=[0]).shape == (1, 3, 32, 32)


# -------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", ["repa-e", "repa-e-aligntok"])
def test_repa_e_as_published(name: str) -> None:
    # Leng et al. 2025: the weights of §3, and the settings of the published training command.
    found = load_recipe(f"recipe:{name}")
    (stage,) = found.stages
    config = stage.denoiser
    assert config is not None
    assert found.tokenizer.load is not None
    assert (config.alignment, config.momentum, config.dropout) == (1.5, 0.1, 0.1)
    assert {loss.name: loss.weight for loss in config.losses} == {"velocity": 1.0, "repa": 0.5}
    assert config.losses[1].options == {"encoder": "dinov2-b", "options": {"antialias": False}}
    assert (config.backbone, config.time.distribution, config.path) == (
        ComponentConfig(name="sit/XL-1"),
        "uniform",
        "linear",
    )
    weights = {loss.name: loss.weight for loss in stage.losses}
    assert weights.items() >= {"l1": 1.0, "lpips": 1.0, "critics/patchgan": 0.1}.items()
    assert ("kl" in weights) == (name == "repa-e")
    assert (stage.steps, stage.batch, stage.ema) == (400_000, 256, 0.9999)
    assert (stage.optimizer.lr, stage.optimizer.betas, stage.optimizer.clip) == (1e-4, (0.9, 0.999), 1.0)
    assert found.diffusion is not None
    assert found.diffusion.start is None
    assert (found.diffusion.backbone, found.diffusion.losses) == (config.backbone, config.losses)


@pytest.mark.slow
def test_the_small_one_runs_from_the_command_line(tmp_path: Path) -> None:
    small = load_recipe("recipe:repa-e-small")
    assert small.tokenizer.load == "runs/aligntok-small/tokenizer"
    save_tokenizer(build_tokenizer(load_recipe("recipe:aligntok-small").tokenizer, 0).eval(), tmp_path / "tokenizer")
    overrides = [
        f"tokenizer.load={tmp_path / 'tokenizer'}",
        *("data.train.length=40", "data.workers=0", "data.holdout=0.2", "latents.batch=8"),
        *("stages.joint.steps=2", "stages.joint.batch=2", "stages.joint.losses.critics/patchgan.start=1"),
        *("diffusion.steps=2", "diffusion.batch=4", "evaluation.sampler.steps=2"),
        *("evaluation.images=4", "evaluation.batch=2", "evaluation.show=2"),
        *("engine.device=cpu", "engine.log_every=1"),
    ]
    process = train(Path("recipe:repa-e-small"), tmp_path / "run", *overrides, until="samples")
    error = finish(process)
    assert process.returncode == 0, error
    first, second = read_rows(tmp_path / "run" / "stages" / "joint" / "metrics.jsonl")
    terms = {"l1", "features", "semantic", "velocity", "repa", "alignment", "critic_real", "lr_encoder", "lr_backbone"}
    assert terms <= first.keys()
    assert terms | {"adversarial"} <= second.keys()
    assert first["lr_encoder"] == pytest.approx(0.2 * first["lr_backbone"])
    for place in (tmp_path / "run", tmp_path / "run" / "stages" / "joint"):
        made = underpaint.load(place)
        assert isinstance(made, Generator)
        how = attrs.evolve(made.settings, sampler=ComponentConfig(name="euler", options={"steps": 2}))
        assert made.sample(torch.tensor([0, 1]), seeds=[0, 1], settings=how).shape == (2, 3, 64, 64)
