"""The tokenizers' recipes for one GPU run as written, smaller still: critics, adaptive weights, heads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import underpaint
from underpaint.config.recipe import plain_recipe
from underpaint.models.tokenizer import Tokenizer
from underpaint.run.pipeline import run_recipe
from underpaint.run.recipes import load_recipe
from underpaint.training.log import read_rows

_LDM = ["tokenizer.encoder.base=16", "tokenizer.decoder.base=16", "tokenizer.decoder.blocks=1"]

# What makes each small enough for seconds on a CPU; the losses are those of the recipe.
SMALLER: dict[str, list[str]] = {
    "aligntok-small": [*_LDM[1:], "diffusion.backbone.width=32", "diffusion.backbone.depth=1"],
    "vfm-vae-small": [
        "tokenizer.decoder.width=32",
        "tokenizer.decoder.base=8",
        "tokenizer.decoder.depths=[1, 1]",
        "diffusion.backbone.width=32",
        "diffusion.backbone.depth=1",
        "diffusion.backbone.heads=2",
    ],
    "va-vae-small": _LDM,
    "kl-vae-small": _LDM,
    "rae-small": ["tokenizer.decoder.width=32", "tokenizer.decoder.depth=1", "tokenizer.decoder.hidden=64"],
}

# Terms that must have been computed in the last step, by recipe and stage.
TERMS: dict[str, dict[str, set[str]]] = {
    "aligntok-small": {
        "align": {"l1", "features", "latent_std", "adversarial", "critic_real", "factor_critics_patchgan"},
        "perceive": {"semantic", "adversarial", "critic_real", "factor_critics_patchgan", "factor_aligntok_semantic"},
        "refine": {"l1", "features", "adversarial", "critic_real", "factor_critics_patchgan"},
    },
    "vfm-vae-small": {
        "strong": {"pyramid", "vf_cosine", "vf_distance", "factor_vf", "kl", "adversarial", "critic_real"},
        "weak": {"vf_cosine", "vf_distance", "factor_vf", "kl", "adversarial", "critic_real"},
        "ssim": {"ssim", "adversarial", "critic_real"},
        "patchgan": {"adversarial", "feature_matching", "critic_real"},
    },
    "va-vae-small": {
        stage: {"kl", "vf_cosine", "vf_distance", "factor_vf", "adversarial", "critic_real", "factor_critics_patchgan"}
        for stage in ("align", "reconstruct", "relax")
    },
    "kl-vae-small": {"autoencoder": {"kl", "adversarial", "critic_real", "factor_critics_patchgan"}},
    "rae-small": {"decoder": {"l1", "features", "adversarial", "critic_real", "factor_critics_projected"}},
}


def overrides(name: str) -> list[str]:
    """Two steps of two images for each stage; what begins later in the recipe begins at the second."""
    plain: dict[str, Any] = plain_recipe(load_recipe(f"recipe:{name}"))
    found = [
        "data.train.length=24",
        "data.holdout=0.25",
        "data.size=32",
        "data.workers=0",
        "evaluation.images=4",
        "evaluation.batch=4",
        "evaluation.show=2",
        "engine.device=cpu",
        "engine.precision=fp32",
        "engine.log_every=1",
        *SMALLER[name],
    ]
    for number, stage in enumerate(plain["stages"]):
        place = f"stages.{number}"
        found += [f"{place}.steps=2", f"{place}.batch=2"]
        for index, loss in enumerate(stage["losses"]):
            if loss["start"] if isinstance(loss, dict) else 0:
                found.append(f"{place}.losses.{index}.start=1")
            if isinstance(loss, dict) and (loss.get("critic") or {}).get("start"):
                found.append(f"{place}.losses.{index}.critic.start=1")
    if plain["diffusion"] is not None:
        found += ["diffusion.steps=2", "diffusion.batch=4", "evaluation.sampler.steps=2", "latents.batch=8"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLER)
def test_runs_through_all_stages(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(f"recipe:{name}", overrides(name))
    run_recipe(recipe, tmp_path)
    assert TERMS[name].keys() == {stage.name for stage in recipe.stages}
    for stage, terms in TERMS[name].items():
        rows = read_rows(tmp_path / "stages" / stage / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2]
        assert terms <= rows[-1].keys(), f"{stage} lacks {terms - rows[-1].keys()}"
        assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
        assert rows[-1]["skipped"] == 0
    assert isinstance(underpaint.load(tmp_path / "tokenizer"), Tokenizer)
    assert (tmp_path / "generator").exists() == (recipe.diffusion is not None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks
@pytest.mark.parametrize("name", ["aligntok-small", "vfm-vae-small", "va-vae-small", "rae-small"])
def test_compiled_equals_eager(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The graphs and their backward passes are those of Inductor; its code generation would take minutes.
    plain_compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: plain_compile(self, backend="aot_eager", **how))
    rows = {}
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        recipe = load_recipe(f"recipe:{name}", [*overrides(name), f"engine.compile={str(compiled).lower()}"])
        run_recipe(recipe, folder, until=recipe.stages[0].name)
        torch._dynamo.reset()
        rows[compiled] = read_rows(folder / "stages" / recipe.stages[0].name / "metrics.jsonl")
    assert len(rows[True]) == 2
    for eager, other in zip(rows[False], rows[True], strict=True):
        for key in TERMS[name][recipe.stages[0].name] | {"loss", "grad_norm"}:
            if key in eager:
                assert other[key] == pytest.approx(eager[key], rel=1e-3, abs=1e-5), key
