"""A stage goes on with the weights it began with, or not at all: its teacher, and what it does not train."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.run.conftest import tiny_recipe
from underpaint.errors import DataError
from underpaint.run.pipeline import run_recipe
from underpaint.training.checkpoint import _digest


def interrupted(finished: Path, out: Path, stage: str, later: tuple[str, ...]) -> Path:
    """Copy a run as it was in the middle of a stage."""
    shutil.copytree(finished, out)
    for name in ("tokenizer", "latents", "generator", *(f"stages/{place}" for place in later)):
        shutil.rmtree(out / name)
    shutil.rmtree(out / "stages" / stage / "tokenizer")
    newest = max((out / "stages" / stage / "checkpoints").glob("step-*"))
    shutil.rmtree(newest)
    return out


def test_the_same_weights_are_gone_on_with(finished: Path, tmp_path: Path) -> None:
    out = interrupted(finished, tmp_path / "run", "perceive", ("refine", "diffusion"))
    run_recipe(tiny_recipe(), out, until="perceive")
    assert (out / "stages" / "perceive" / "tokenizer" / "config.json").exists()


def test_another_teacher_is_refused(finished: Path, tmp_path: Path) -> None:
    out = interrupted(finished, tmp_path / "run", "perceive", ("refine", "diffusion"))
    shutil.copytree(finished / "stages/perceive/tokenizer", out / "stages/align/tokenizer", dirs_exist_ok=True)
    with pytest.raises(DataError, match=r"was trained with another teacher, of hash .*start stage 'perceive' anew\."):
        run_recipe(tiny_recipe(), out)


def decoder_bias(place: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    state = load_file(place / "model.safetensors")
    state["decoder.conv_out.bias"] = change(state["decoder.conv_out.bias"])
    save_file(state, place / "model.safetensors")


def test_other_frozen_weights_are_refused(finished: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("stages.refine.trains=[decoder.conv_in]")
    run_recipe(recipe, tmp_path / "whole", until="refine")
    whole = tmp_path / "whole"
    for name in ("latents", "generator", "stages/diffusion"):
        (whole / name).mkdir(parents=True, exist_ok=True)
    (whole / "tokenizer").mkdir()
    out = interrupted(whole, tmp_path / "run", "refine", ("diffusion",))
    # The fingerprint is that of the latents, and says nothing of the decoder.
    decoder_bias(out / "stages/perceive/tokenizer", lambda bias: bias + 0.1)
    with pytest.raises(DataError, match="was trained with another set of frozen weights"):
        run_recipe(recipe, out)


def test_a_checkpoint_of_an_earlier_version_says_nothing(finished: Path, tmp_path: Path) -> None:
    out = interrupted(finished, tmp_path / "run", "perceive", ("refine", "diffusion"))
    for manifest in (out / "stages/perceive/checkpoints").glob("*/manifest.json"):
        body = json.loads(manifest.read_text())["body"]
        del body["extra"]["origin"]
        manifest.write_text(json.dumps({"body": body, "sha256": _digest(body)}))
    run_recipe(tiny_recipe(), out, until="perceive")
