"""A stage goes on with the weights and images it began with, or not at all: teacher, frozen parts, tokenizer, data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import underpaint
from tests.run.conftest import tiny_recipe
from underpaint.errors import DataError
from underpaint.run.pipeline import run_recipe
from underpaint.run.training import _check_same
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


def encoder_file(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    encoder = underpaint.create("encoder", "tiny/vit@random", **SMALL)
    save_file({name: torch.randn_like(value) for name, value in encoder.state_dict().items()}, path)


SMALL = {"width": 32, "depth": 1, "heads": 2}


@pytest.mark.parametrize("kind", ["features", "critics/projected"])
def test_another_network_of_a_loss_is_refused(finished: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "eye.safetensors"
    encoder_file(path, 0)
    loss = {"name": kind, "encoder": f"tiny/vit@file:{path}", "options": SMALL, "layers": [0]}
    recipe = tiny_recipe(f"stages.align.losses={json.dumps(['l1', loss])}")
    out = tmp_path / "run"
    run_recipe(recipe, out, until="align")
    shutil.rmtree(out / "stages" / "align" / "tokenizer")
    newest = max((out / "stages" / "align" / "checkpoints").glob("step-*"))
    shutil.rmtree(newest)
    encoder_file(path, 1)
    with pytest.raises(DataError, match=f"another set of frozen weights of the loss '{kind.replace('/', '_')}'"):
        run_recipe(recipe, out, until="align")
    encoder_file(path, 0)
    run_recipe(recipe, out, until="align")


def photographs(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        values = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{index:03d}.png")
    return folder


@pytest.mark.parametrize("recorded", [True, False])
def test_a_data_set_that_has_grown_is_refused(tmp_path: Path, recorded: bool) -> None:
    train = {"name": "files/folder", "path": str(photographs(tmp_path / "photos", 20))}
    recipe = tiny_recipe(f"data.train={json.dumps(train)}")
    out = tmp_path / "run"
    run_recipe(recipe, out, until="align")
    shutil.rmtree(out / "stages" / "align" / "tokenizer")
    shutil.rmtree(max((out / "stages" / "align" / "checkpoints").glob("step-*")))
    photographs(tmp_path / "photos", 21)
    message = r"was begun on 16 images of files/folder .* now has 1\d images .* put the earlier files back"
    if not recorded:
        # As the advice for a damaged one is.
        (out / "provenance.json").unlink()
        message = "was trained with another set of training images, of hash"
    with pytest.raises(DataError, match=message):
        run_recipe(recipe, out, until="align")
    if recorded:
        (tmp_path / "photos" / "020.png").unlink()
        run_recipe(recipe, out, until="align")


def test_a_generator_does_not_go_on_with_latents_of_another_tokenizer(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "generator")
    shutil.rmtree(max((out / "stages" / "diffusion" / "checkpoints").glob("step-*")))
    # What the cache's refusal of another tokenizer asks for.
    shutil.rmtree(out / "latents")
    shutil.copytree(finished / "stages/align/tokenizer", out / "stages/refine/tokenizer", dirs_exist_ok=True)
    with pytest.raises(DataError, match="was trained with another tokenizer, of hash .*start stage 'diffusion' anew"):
        run_recipe(tiny_recipe(), out)


class TwoRanks:
    """Ranks of which the other one has another teacher."""

    def all_gather_object(self, value: dict[str, str]) -> list[dict[str, str]]:
        return [value, value | {"teacher": "b" * 64}]


def test_ranks_with_different_files_are_refused() -> None:
    same = SimpleNamespace(name="align", origin={"teacher": "b" * 64})
    _check_same(TwoRanks(), same)  # type: ignore[arg-type]
    other = SimpleNamespace(name="align", origin={"teacher": "a" * 64})
    with pytest.raises(DataError, match=r"'align' has on rank 1 another teacher, of hash b{12}, than on rank 0"):
        _check_same(TwoRanks(), other)  # type: ignore[arg-type]
