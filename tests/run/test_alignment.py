"""Diffusion aligned with an encoder: REPA and REG through a whole run, and on after a stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import underpaint
from tests.run.conftest import finish, recipe_file, tiny_recipe, train
from underpaint.errors import ConfigError
from underpaint.models.generator import Generator
from underpaint.run.pipeline import run_recipe
from underpaint.training.log import read_rows
from underpaint.weights import tensor_hash

ENCODER: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2}
REPA: dict[str, Any] = {
    "name": "repa",
    "weight": 0.5,
    "encoder": "tiny/vit@random",
    "options": ENCODER,
    "layer": 0,
    "projector": 16,
}
LOSSES = ["velocity", REPA, {"name": "companion", "weight": 0.03}]


def overrides(tokenizer: Path, **changes: Any) -> list[str]:
    settings = {
        "tokenizer": {"load": str(tokenizer)},
        "stages": [],
        "latents.flip": True,
        "diffusion.backbone": {"name": "reg/S-1", "width": 32, "depth": 2, "heads": 2, "companion": 32},
        "diffusion.companion": {"name": "tiny/vit@random", **ENCODER},
        "diffusion.losses": LOSSES,
        "diffusion.steps": 6,
        "engine.accumulation": 2,
        **changes,
    }
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def aligned(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("aligned") / "run"
    run_recipe(tiny_recipe(*overrides(finished / "tokenizer")), out)
    return out


def rows(out: Path) -> list[dict[str, Any]]:
    return read_rows(out / "stages" / "diffusion" / "metrics.jsonl")


def test_every_term_is_trained_and_logged(aligned: Path) -> None:
    found = rows(aligned)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    for row in found:
        assert row["loss"] == pytest.approx(row["velocity"] + 0.5 * row["repa"] + 0.03 * row["companion"], rel=1e-4)
        assert -1.0 <= row["repa"] <= 1.0
    # At first the head of the vector gives zero: the error is the mean square of ε − c0, above that of ε.
    assert found[0]["companion"] > 0.8
    assert found[-1]["loss"] != found[0]["loss"]


def test_the_generator_holds_the_backbone_and_no_projector(aligned: Path) -> None:
    generator = underpaint.load(aligned)
    assert isinstance(generator, Generator)
    assert generator.backbone.companion == 32
    names = set(generator.state_dict())
    assert not any("projector" in name for name in names)
    images = generator.sample(torch.tensor([0, 1]), seeds=[5, 6])
    assert images.shape == (2, 3, 32, 32)
    before = underpaint.load(aligned / "tokenizer")
    assert generator.tokenizer.fingerprint() == before.fingerprint()


def test_it_goes_on_to_the_same_weights(aligned: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(aligned, out)
    # What a run leaves that was killed after its fourth step.
    shutil.rmtree(out / "generator")
    newest = sorted((out / "stages" / "diffusion" / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    run_recipe(tiny_recipe(*overrides(finished / "tokenizer")), out)
    first, second = underpaint.load(aligned), underpaint.load(out)
    assert tensor_hash(first.backbone.state_dict()) == tensor_hash(second.backbone.state_dict())
    np.testing.assert_array_equal([row["loss"] for row in rows(out)][-6:], [row["loss"] for row in rows(aligned)])


@pytest.mark.parametrize("read", ["random", "sequential"])
def test_repa_alone_aligns_a_plain_backbone(finished: Path, tmp_path: Path, read: str) -> None:
    # Images that do not follow the order of the latents are refused.
    changes: dict[str, Any] = {
        "diffusion.backbone": {"name": "lightningdit/S-1", "width": 32, "depth": 2, "heads": 2},
        "diffusion.companion": None,
        "diffusion.losses": ["velocity", REPA],
        "diffusion.steps": 2,
        "data.memory": read == "random",
        "latents.read": read,
        "latents.block": 4,
        "latents.window": 2,
    }
    run_recipe(tiny_recipe(*overrides(finished / "tokenizer", **changes)), tmp_path / "run")
    assert all(
        row["loss"] == pytest.approx(row["velocity"] + 0.5 * row["repa"], rel=1e-4) for row in rows(tmp_path / "run")
    )


def test_a_companion_of_another_width_is_refused_before_training(finished: Path, tmp_path: Path) -> None:
    changes = {"diffusion.companion": {"name": "tiny/vit@random", **ENCODER, "width": 64}}
    with pytest.raises(ConfigError, match="has pooled features of 64 channels, and the backbone 'reg/S-1' denoises a"):
        run_recipe(tiny_recipe(*overrides(finished / "tokenizer", **changes)), tmp_path / "run")
    assert not (tmp_path / "run" / "stages" / "diffusion").exists()


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_two_ranks_give_the_losses_of_one(zero: int, aligned: Path, finished: Path, tmp_path: Path) -> None:
    changes = [*overrides(finished / "tokenizer"), f"engine.zero={zero}"]
    process = train(recipe_file(tmp_path), tmp_path / "run", *changes, ranks=2, until="diffusion")
    error = finish(process)
    assert process.returncode == 0, error
    for name in ("loss", "repa", "companion"):
        # Sums over ranks are rounded in another order.
        np.testing.assert_allclose(
            [row[name] for row in rows(tmp_path / "run")], [row[name] for row in rows(aligned)], rtol=1e-3
        )
