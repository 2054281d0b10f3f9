"""Whole stages with critics, heads, adaptive weights and stop rules: interrupted, handed on, ended early."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import underpaint
from tests.run.conftest import TINY, finish, train
from underpaint.config.recipe import plain_recipe, recipe_from_plain
from underpaint.config.schema import Recipe
from underpaint.errors import ConfigError, DataError
from underpaint.evaluation.probe import linear_probe
from underpaint.models.tokenizer import Tokenizer
from underpaint.run import tokenizer_stage
from underpaint.run.data import open_run_data
from underpaint.run.pipeline import run_recipe
from underpaint.training import loop
from underpaint.training.log import read_rows
from underpaint.training.ranks import Ranks
from underpaint.weights import file_hash, tensor_hash

PATCHGAN = {"name": "critics/patchgan", "channels": 4, "layers": 2, "weight": 0.5, "r1": 1.0, "r1_interval": 2}
VF = {"name": "vf", "weight": 0.1, "adaptive": "adapter"}
FIRST = {
    "name": "first",
    "trains": ["adapter", "decoder"],
    "losses": ["l1", {**PATCHGAN, "adaptive": "decoder", "start": 1}, VF],
    "steps": 4,
    "batch": 4,
    "ema": 0.5,
    "equivariance": {"scales": [0.5, 1.0]},
}
SECOND = {
    "name": "second",
    "trains": ["adapter", "decoder.conv_out"],
    "losses": ["l1", {**PATCHGAN, "critic": {"carry": "first"}}, {**VF, "adaptive": None}],
    "steps": 4,
    "batch": 4,
    "ema": None,
}

# No measurement is ten times better than the first, so the stage ends two steps after it.
STOP = {"metrics": ["psnr"], "every": 1, "patience": 2, "tolerance": 10.0, "images": 4}


def recipe(*stages: dict[str, Any], **changes: Any) -> Recipe:
    plain = copy.deepcopy({key: value for key, value in TINY.items() if key not in ("diffusion", "latents")})
    plain["stages"] = copy.deepcopy(list(stages))
    plain["evaluation"] = {"images": 4, "batch": 4, "show": 2, "reconstruction": ["psnr"]}
    plain["engine"] |= changes.pop("engine", {})
    plain["data"] |= changes.pop("data", {})
    return recipe_from_plain(plain | changes)


def weights(out: Path, stage: str) -> dict[str, torch.Tensor]:
    tokenizer = underpaint.load(out / "stages" / stage / "tokenizer")
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer.state_dict()


def measured(out: Path, stage: str, *names: str) -> list[list[Any]]:
    rows = read_rows(out / "stages" / stage / "metrics.jsonl")
    return [[row.get(name) for name in ("step", "loss", *names)] for row in rows]


@pytest.fixture(scope="module")
def adversarial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two stages with critics and heads. Tests read it and never write into it."""
    out = tmp_path_factory.mktemp("adversarial") / "run"
    run_recipe(recipe(FIRST, SECOND), out)
    return out


def test_critics_and_heads_lie_beside_the_tokenizer_and_not_in_it(adversarial: Path) -> None:
    for name in ("first", "second"):
        folder = adversarial / "stages" / name
        assert [path.name for path in (folder / "critics").iterdir()] == ["critics_patchgan.safetensors"]
        assert [path.name for path in (folder / "heads").iterdir()] == ["vf.safetensors"]
    tokenizers = list(adversarial.rglob("model.safetensors"))
    assert len(tokenizers) == 3
    for path in tokenizers:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        assert {name.partition(".")[0] for name in names} == {"encoder", "adapter", "decoder"}


def test_what_is_logged(adversarial: Path) -> None:
    first, *others = read_rows(adversarial / "stages" / "first" / "metrics.jsonl")
    assert {"l1", "vf_cosine", "factor_vf", "critic_real", "critic_fake", "critic_r1"} <= first.keys()
    assert not {"adversarial", "factor_critics_patchgan"} & first.keys()
    assert all({"adversarial", "factor_critics_patchgan", "factor_vf"} <= row.keys() for row in others)


def test_only_the_named_submodules_change(adversarial: Path) -> None:
    before, after = weights(adversarial, "first"), weights(adversarial, "second")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(("adapter.", "decoder.conv_out."))}


def test_critic_and_head_go_on_from_the_earlier_stage(
    adversarial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(adversarial, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "stages" / "second")
    seen: dict[str, dict[str, torch.Tensor]] = {}
    real = tokenizer_stage.train_stage

    def look(session: Any, plan: Any) -> Any:
        for what, module in (("critics", plan.adversaries[0].loss.critic), ("heads", plan.module.losses["vf"])):
            seen[what] = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        return real(session, plan)

    monkeypatch.setattr(tokenizer_stage, "train_stage", look)
    run_recipe(recipe(FIRST, SECOND), tmp_path / "run")
    for what, key in (("critics", "critics_patchgan"), ("heads", "vf")):
        kept = load_file(adversarial / "stages" / "first" / what / f"{key}.safetensors")
        assert tensor_hash(seen[what]) == tensor_hash(kept)
        trained = load_file(adversarial / "stages" / "second" / what / f"{key}.safetensors")
        assert tensor_hash(trained) != tensor_hash(kept)
    assert "stage second: the layers of the loss vf go on from stage first" in capsys.readouterr().err


class Cut(Exception):
    pass


def cut(monkeypatch: pytest.MonkeyPatch, stage: str, step: int) -> None:
    """Let a process die in a stage after its checkpoint of a step."""
    real = loop.train_loop

    def cut_short(**arguments: Any) -> object:
        call = arguments["call"]

        def dying(hook: str, **facts: Any) -> None:
            call(hook, **facts)
            if hook == "on_checkpoint_saved" and arguments["start"] == 0 and (facts["stage"], facts["step"]) == place:
                raise Cut

        place = (stage, step)
        return real(**arguments | {"call": dying})

    monkeypatch.setattr("underpaint.run.training.train_loop", cut_short)


def check_equal(out: Path, other: Path) -> None:
    for name in ("first", "second"):
        assert tensor_hash(weights(out, name)) == tensor_hash(weights(other, name))
        for file in ("critics/critics_patchgan.safetensors", "heads/vf.safetensors"):
            assert file_hash(out / "stages" / name / file) == file_hash(other / "stages" / name / file)
        terms = ("adversarial", "critic_real", "critic_fake", "critic_r1", "vf_cosine", "factor_vf")
        assert measured(out, name, *terms) == measured(other, name, *terms)


@pytest.mark.parametrize("stage", ["first", "second"])
def test_interrupted_training_goes_on_bit_by_bit(
    adversarial: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
) -> None:
    cut(monkeypatch, stage, 2)
    with pytest.raises(Cut):
        run_recipe(recipe(FIRST, SECOND), tmp_path / "run")
    assert f"stage {stage}: the layers of the loss vf" in capsys.readouterr().err
    run_recipe(recipe(FIRST, SECOND), tmp_path / "run")
    assert f"stage {stage}: the layers of the loss vf" not in capsys.readouterr().err
    check_equal(tmp_path / "run", adversarial)


@pytest.mark.parametrize("place", [20, -20], ids=["header", "weights"])
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(
    adversarial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: int
) -> None:
    cut(monkeypatch, "second", 4)
    with pytest.raises(Cut):
        run_recipe(recipe(FIRST, SECOND), tmp_path / "run")
    newest = tmp_path / "run" / "stages" / "second" / "checkpoints" / "step-0000004"
    (file,) = newest.glob("engine-*.safetensors")
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    run_recipe(recipe(FIRST, SECOND), tmp_path / "run")
    (message,) = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    assert f"The checkpoint '{newest}' is skipped: the content of '{file.name}' does not match its hash" in message
    check_equal(tmp_path / "run", adversarial)
    # The step was trained again, and what was saved of it then is whole.
    assert file_hash(file) == json.loads((newest / "manifest.json").read_text())["body"]["files"][file.name]["sha256"]


def test_a_stage_does_not_depend_on_the_process_that_starts_it(
    adversarial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before the second stage's first checkpoint: a new process starts it from the beginning, with a critic and random
    # layers of the losses that must be those of the first.
    shutil.copytree(adversarial, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "stages" / "second")
    torch.manual_seed(99)
    run_recipe(recipe(FIRST, SECOND), tmp_path / "run")
    check_equal(tmp_path / "run", adversarial)


@pytest.mark.slow
def test_layers_of_a_loss_that_start_anew_are_those_of_the_stage(tmp_path: Path) -> None:
    plain = {**FIRST, "losses": ["l1"], "steps": 1}
    later = {**SECOND, "losses": ["l1", PATCHGAN, {"name": "vf"}], "steps": 1}
    run_recipe(recipe(plain, later), tmp_path / "whole")
    run_recipe(recipe(plain, later), tmp_path / "parts", until="first")
    torch.manual_seed(99)
    run_recipe(recipe(plain, later), tmp_path / "parts")
    assert measured(tmp_path / "whole", "second", "adversarial", "vf_cosine") == measured(
        tmp_path / "parts", "second", "adversarial", "vf_cosine"
    )


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2])
def test_interrupted_training_with_sharded_engines_goes_on_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero: int
) -> None:
    config = recipe(FIRST, SECOND, engine={"zero": zero})
    run_recipe(config, tmp_path / "whole")
    cut(monkeypatch, "second", 2)
    with pytest.raises(Cut):
        run_recipe(config, tmp_path / "run")
    run_recipe(config, tmp_path / "run")
    check_equal(tmp_path / "run", tmp_path / "whole")


def test_a_critic_that_cannot_be_carried_over_ends_the_run(tmp_path: Path) -> None:
    wider = {**SECOND, "losses": ["l1", {**PATCHGAN, "channels": 8, "critic": {"carry": "first"}}]}
    with pytest.raises(DataError, match="of stage 'first' differs from this stage's 'critics/patchgan'"):
        run_recipe(recipe({**FIRST, "steps": 1}, wider), tmp_path / "wider")
    with pytest.raises(DataError, match="from stage 'first', which has no critic"):
        run_recipe(recipe({**FIRST, "losses": ["l1"], "steps": 1}, SECOND), tmp_path / "none")


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (["l1", {"name": "mse", "adaptive": "decoder"}], "'first' has adaptive weights, and engine.zero is 3"),
        (["l1", PATCHGAN], "'critics/patchgan' has a critic, and engine.zero is 3"),
    ],
)
def test_zero_3_is_refused_before_training(tmp_path: Path, losses: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_recipe(recipe({**FIRST, "losses": losses}, engine={"zero": 3}), tmp_path / "run")
    assert not (tmp_path / "run" / "stages" / "first" / "metrics.jsonl").exists()


def test_two_critics_keep_their_terms_apart(tmp_path: Path) -> None:
    projected = {
        "name": "critics/projected",
        "encoder": "tiny/vit@random",
        "options": {"width": 48, "depth": 2, "heads": 2},
        "layers": [0, 1],
        "summary": "pooled",
    }
    run_recipe(recipe({**FIRST, "losses": ["l1", PATCHGAN, projected], "steps": 1}), tmp_path / "run")
    (row,) = read_rows(tmp_path / "run" / "stages" / "first" / "metrics.jsonl")
    names = {name for name in row if name.startswith(("adversarial", "critic_"))}
    assert names == {
        *("adversarial", "critic_real", "critic_fake", "critic_r1"),
        *(f"{name}_critics_projected" for name in ("adversarial", "critic_real", "critic_fake")),
    }
    assert len(list((tmp_path / "run" / "stages" / "first" / "critics").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2])
def test_two_ranks_give_the_losses_of_one(tmp_path: Path, zero: int) -> None:
    critic = {"name": "critics/multiscale", "channels": 4, "layers": 2, "scales": 1, "virtual_batch": 1}
    losses = ["l1", {"name": "mse", "adaptive": "adapter"}, {**critic, "adaptive": "decoder"}, VF]
    stage = {**FIRST, "losses": losses, "equivariance": None, "stop": {**STOP, "images": 7, "probe": 15}, "steps": 9}
    run_recipe(recipe(stage), tmp_path / "one")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(plain_recipe(recipe(stage, engine={"zero": zero}))))
    process = train(file, tmp_path / "two", ranks=2, until="first")
    error = finish(process)
    assert process.returncode == 0, error
    terms = ("mse", "adversarial", "factor_mse", "factor_critics_multiscale", "factor_vf", "critic_fake", "grad_norm")
    one, two = (measured(tmp_path / name, "first", *terms) for name in ("one", "two"))
    assert len(one) == len(two) == 3
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)
    # Whole images right or wrong, of those of both ranks together.
    probes = [[row["values"]["probe"] for row in stopping(tmp_path / name)] for name in ("one", "two")]
    assert probes[0] == [[pytest.approx(share), None] for share, _ in probes[1]]
    assert all(share * 7 == pytest.approx(round(share * 7), abs=1e-5) for share, _ in probes[1])


# ---------------------------------------------------------------------------------------------- stop rules


def stopping(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "stages" / "first" / "stopping.jsonl").read_text().splitlines()]


LONG = {**FIRST, "losses": ["l1"], "steps": 40, "stop": STOP}
SHORT = {**SECOND, "losses": ["l1"], "trains": ["decoder"], "steps": 1}


@pytest.mark.parametrize("zero", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_stage_ends_early_and_the_next_one_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], zero: int
) -> None:
    config = recipe(LONG, SHORT, engine={"log_every": 2, "zero": zero})
    run_recipe(config, tmp_path / "run")
    assert [row[0] for row in measured(tmp_path / "run", "first")] == [2, 3]
    assert [row[0] for row in measured(tmp_path / "run", "second")] == [1]
    assert [row["step"] for row in stopping(tmp_path / "run")] == [1, 2, 3]
    assert "stage first: ended after 3 steps, none better in 2" in capsys.readouterr().err
    about = json.loads((tmp_path / "run" / "stages" / "first" / "tokenizer" / "config.json").read_text())["about"]
    assert "for up to 40 steps of 4" in about["facts"][0]
    before = {path: file_hash(path) for path in (tmp_path / "run" / "stages").rglob("*") if path.is_file()}
    run_recipe(config, tmp_path / "run")
    after = {path: file_hash(path) for path in (tmp_path / "run" / "stages").rglob("*") if path.is_file()}
    assert before == after


def test_the_measured_weights_are_those_that_are_exported(tmp_path: Path) -> None:
    # The report's number after the stage is of the same images, rounded the same way.
    run_recipe(recipe(LONG), tmp_path / "run")
    last = stopping(tmp_path / "run")[-1]
    numbers = json.loads((tmp_path / "run" / "report" / "numbers.json").read_text())
    (reported,) = [n["value"] for n in (numbers["numbers"] if isinstance(numbers, dict) else numbers)]
    assert last["values"]["psnr"] == [pytest.approx(reported, rel=1e-6), True]


def test_the_probe_is_of_the_exported_latents(tmp_path: Path) -> None:
    config = recipe({**LONG, "stop": {**STOP, "images": 8, "probe": 20}})
    run_recipe(config, tmp_path / "run")
    last = stopping(tmp_path / "run")[-1]
    tokenizer = underpaint.load(tmp_path / "run" / "stages" / "first" / "tokenizer")
    data = open_run_data(config.data)
    train = {int(index) for batch in data.train_pass(20, 20, Ranks("cpu")) for index in batch.indices}
    assert len(train) == 20
    assert train <= set(data.train_indices.tolist())

    def known(indices: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        samples = [data.train[index] for index in indices]
        images = torch.stack([torch.from_numpy(sample.image.copy()) for sample in samples])
        latents = tokenizer.encode(images.permute(0, 3, 1, 2).float() / 127.5 - 1.0)
        return latents.flatten(2).mean(2).detach(), torch.tensor([sample.label for sample in samples])

    expected = linear_probe(*known(sorted(train)), *known(data.validation_indices.tolist()))
    assert last["values"]["probe"] == [pytest.approx(expected, abs=1e-6), None]


def test_a_probe_without_labels_is_refused_before_anything_trains(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for index in range(4):
        Image.new("RGB", (32, 32), (60 * index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
    data = {"train": {"name": "files/folder", "path": str(tmp_path / "images")}, "holdout": 0.5}
    stage = {**LONG, "stop": {**STOP, "probe": 20}}
    with pytest.raises(
        ConfigError, match="stop.probe of stage 'second' .* data.train has none; .*second.stop.probe=null"
    ):
        run_recipe(recipe({**SHORT, "name": "first"}, {**stage, "name": "second"}, data=data), tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()


@pytest.mark.parametrize("step", [1, 2])
def test_an_interrupted_stage_ends_where_it_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    config = recipe(LONG, engine={"checkpoint_every": 1})
    run_recipe(config, tmp_path / "whole")
    cut(monkeypatch, "first", step)
    with pytest.raises(Cut):
        run_recipe(config, tmp_path / "run")
    run_recipe(config, tmp_path / "run")
    assert tensor_hash(weights(tmp_path / "run", "first")) == tensor_hash(weights(tmp_path / "whole", "first"))
    files = [tmp_path / name / "stages" / "first" / "stopping.jsonl" for name in ("run", "whole")]
    assert files[0].read_text() == files[1].read_text()


def test_a_stage_that_ended_but_was_not_exported_trains_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(recipe(LONG), tmp_path / "whole")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(tokenizer_stage, "save_tokenizer", full)
        run_recipe(recipe(LONG), tmp_path / "run")
    run_recipe(recipe(LONG), tmp_path / "run")
    assert [row[0] for row in measured(tmp_path / "run", "first")] == [1, 2, 3]
    assert tensor_hash(weights(tmp_path / "run", "first")) == tensor_hash(weights(tmp_path / "whole", "first"))


def test_a_metric_without_a_direction_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = underpaint.create("metric", "psnr")
    monkeypatch.setattr(type(metric), "higher_is_better", None)
    with pytest.raises(ConfigError, match="stop.metrics of stage 'first' has 'psnr', which does not say whether"):
        run_recipe(recipe(LONG), tmp_path / "run")


# ------------------------------------------------------------------------------------- teachers, views, data


def test_the_teacher_may_be_the_tokenizer_that_the_recipe_loads(adversarial: Path, tmp_path: Path) -> None:
    start = str(adversarial / "stages" / "second" / "tokenizer")
    stage = {
        **SHORT,
        "trains": ["encoder", "adapter"],
        "losses": ["aligntok/semantic"],
        "teacher": "start",
        "steps": 2,
    }
    run_recipe(recipe(stage, tokenizer={"load": start}), tmp_path / "run")
    values = measured(tmp_path / "run", "second", "semantic")
    # The student starts as its teacher.
    assert values[0][2] == 0.0
    with pytest.raises(ConfigError, match=r"teacher is 'start'.*tokenizer.load is not set"):
        recipe(stage)


def test_arithmetic_is_counted_without_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    def stop(session: Any, plan: Any) -> None:
        assert plan.module.training
        counted.append(plan.flops)
        raise Cut

    monkeypatch.setattr(tokenizer_stage, "train_stage", stop)
    views = {"latent": 1.0, "input": 0.0, "scales": [0.25]}
    for index, equivariance in enumerate((None, views)):
        with pytest.raises(Cut):
            run_recipe(recipe({**LONG, "equivariance": equivariance}), tmp_path / str(index))
    assert counted[0] == counted[1] > 0


@pytest.mark.slow
def test_images_in_memory_give_the_losses_of_images_that_are_read(tmp_path: Path) -> None:
    stage = {**SHORT, "steps": 10}
    for name in (True, False):
        run_recipe(recipe(stage, data={"memory": name}), tmp_path / str(name))
    assert measured(tmp_path / "True", "second") == measured(tmp_path / "False", "second")
