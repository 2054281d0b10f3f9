"""Stages that cannot be trained are refused in one sentence before the first of them is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

import underpaint
from tests.run.conftest import TINY
from tests.run.test_bad_generators import train
from underpaint.config.recipe import recipe_from_plain
from underpaint.run.pipeline import run_recipe

ADAPTIVE = ["l1", {"name": "mse", "adaptive": "decoder"}]
STOP = {"metrics": ["psnr"], "every": 1, "images": 4}
CRITIC = {"name": "critics/patchgan", "channels": 4, "layers": 2}


def later(**changes: Any) -> list[dict[str, Any]]:
    """The stages of the tiny recipe, the last of them with changes."""
    *earlier, last = copy.deepcopy(TINY["stages"])
    return [*earlier, {**last, **changes}]


CASES: list[tuple[dict[str, Any], str]] = [
    ({"stop": {**STOP, "metrics": ["psnt"]}}, "stages[2].stop.metrics[0]: There is no metric 'psnt'"),
    ({"stop": {**STOP, "metrics": [{"name": "psnr", "x": 1}]}}, "stages[2].stop.metrics[0]"),
    ({"teacher": "perceeve"}, "stages[2].teacher is 'perceeve', which is not an earlier stage"),
    ({"losses": ["l1", "aligntok/semantic"]}, "stages[2].losses[1]: the loss 'aligntok/semantic' needs"),
    (
        {"optimizer": {"parts": {"adapter": {"lr": 1e-3}}}},
        "stages[2].optimizer.parts names 'adapter', which is no part that is trained here. Known: 'decoder'.",
    ),
    (
        {"losses": ["l1", {**CRITIC, "critic": {"optimizer": {"parts": {"decoder": {}}}}}]},
        "stages[2].losses[1].critic.optimizer.parts names 'decoder', which is no part that is trained here.",
    ),
    (
        {"losses": ADAPTIVE, "trains": ["adapter"]},
        "stages[2]: An adaptive weight is measured at the last layer of the decoder, which this stage does not train",
    ),
    (
        {"losses": ADAPTIVE, "trains": ["decoder.conv_in"]},
        "stages[2]: An adaptive weight is measured at the last layer of the decoder, which this stage does not train",
    ),
    ({"trains": ["decoder.heads"]}, "stages[2]: trains names 'decoder.heads', but 'decoder' has no 'heads'."),
    (
        {"trains": ["encoder"], "lora": {"rank": 2, "layers": "no such"}},
        "stages[2]: lora.layers is 'no such', which matches no linear layer of 'encoder'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), CASES, ids=[message[:50] for _, message in CASES])
def test_a_later_stage_is_refused_before_the_first_one_is_trained(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert message in train(tmp_path, stages=later(**changes))


def test_parts_of_the_diffusion_model_too(tmp_path: Path) -> None:
    message = "diffusion.optimizer.parts names 'model', which is no part that is trained here. Known: 'backbone',"
    assert message in train(tmp_path, **{"diffusion.optimizer": {"parts": {"model": {"lr": 1e-3}}}})


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (ADAPTIVE, "Stage 'refine' has adaptive weights, and engine.zero is 3"),
        (["l1", CRITIC], "The loss 'critics/patchgan' has a critic, and engine.zero is 3"),
    ],
)
def test_what_zero_3_cannot_train_in_a_later_stage(tmp_path: Path, losses: list[Any], message: str) -> None:
    assert message in train(tmp_path, stages=later(losses=losses), **{"engine.zero": 3})


def test_a_metric_that_cannot_be_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(underpaint.create("metric", "psnr")), "higher_is_better", None)
    message = "stop.metrics of stage 'refine' has 'psnr', which does not say whether higher is better"
    assert message in train(tmp_path, stages=later(stop=STOP))


def test_a_check_changes_nothing_of_what_is_trained(tmp_path: Path) -> None:
    # Pairs that a check made would be there when the stages train.
    stages = later(trains=["encoder"], lora={"rank": 2, "alpha": 2.0, "parts": ["encoder"]})
    for stage in stages:
        stage["steps"] = 1
    recipe = recipe_from_plain({**copy.deepcopy(TINY), "stages": stages, "diffusion": None})
    run_recipe(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "stages" / "refine" / "tokenizer").is_dir()
