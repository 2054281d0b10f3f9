"""Stages with low-rank adaptation: what they export, that they are resumed, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.run.test_stages import Cut, cut, measured, recipe, weights
from underpaint.errors import ConfigError
from underpaint.run.pipeline import run_recipe
from underpaint.weights import tensor_hash

ALIGN = {"name": "first", "trains": ["adapter", "decoder"], "losses": ["l1"], "steps": 1, "batch": 4, "ema": None}
STAGE = {
    "name": "second",
    "trains": ["encoder", "adapter", "decoder"],
    "losses": ["l1", {"name": "aligntok/semantic", "weight": 0.1}],
    "teacher": "first",
    "steps": 4,
    "batch": 4,
    "ema": 0.5,
    "optimizer": {"lr": 0.01},
    "lora": {"rank": 2, "alpha": 4.0, "layers": "mlp"},
}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Tests read it and never write into it."""
    out = tmp_path_factory.mktemp("adapted") / "run"
    run_recipe(recipe(ALIGN, STAGE), out)
    return out


def test_the_export_is_a_plain_tokenizer_with_changes_of_low_rank(adapted: Path) -> None:
    before, after = weights(adapted, "first"), weights(adapted, "second")
    assert before.keys() == after.keys()
    changed = {name for name in before if name.startswith("encoder.") and not torch.equal(before[name], after[name])}
    assert changed == {f"encoder.blocks.{block}.mlp_{side}.weight" for block in (0, 1) for side in ("in", "out")}
    for name in changed:
        sizes = torch.linalg.svdvals(after[name].double() - before[name].double())
        assert sizes[1] > 1e-6
        assert sizes[2] < 1e-6 * sizes[0] + 1e-7
    about = json.loads((adapted / "stages" / "second" / "tokenizer" / "config.json").read_text())["about"]
    assert "second: encoder (LoRA of rank 2) + adapter + decoder for 4 steps" in about["facts"][0]


def test_what_is_exported_is_the_average_of_the_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, dict[str, Tensor]] = {}
    from underpaint.training.engine import Engine

    real = Engine.state

    def look(engine: Engine, kind: str) -> dict[str, Tensor]:
        if any(".parametrizations." in name for name in engine._names):
            seen.update({which: real(engine, which) for which in ("raw", "ema")})
        return real(engine, kind)

    monkeypatch.setattr(Engine, "state", look)
    run_recipe(recipe(ALIGN, STAGE), tmp_path / "run")
    name = "encoder.blocks.1.mlp_in"
    sums = {}
    for kind, state in seen.items():
        original, up, down = (state[f"{name}.parametrizations.weight.{key}"] for key in ("original", "0.up", "0.down"))
        sums[kind] = original.double() + 2.0 * up.double() @ down.double()
    exported = weights(tmp_path / "run", "second")[f"{name}.weight"].double()
    torch.testing.assert_close(exported, sums["ema"], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(exported, sums["raw"], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("zero", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_interrupted_training_goes_on_bit_by_bit(
    tmp_path: Path, adapted: Path, monkeypatch: pytest.MonkeyPatch, zero: int
) -> None:
    config = recipe(ALIGN, STAGE, engine={"zero": zero})
    whole = adapted
    if zero:
        whole = tmp_path / "whole"
        run_recipe(config, whole)
    cut(monkeypatch, "second", 2)
    with pytest.raises(Cut):
        run_recipe(config, tmp_path / "run")
    torch.manual_seed(99)
    run_recipe(config, tmp_path / "run")
    assert tensor_hash(weights(tmp_path / "run", "second")) == tensor_hash(weights(whole, "second"))
    assert measured(tmp_path / "run", "second", "semantic") == measured(whole, "second", "semantic")


def test_the_pairs_do_not_depend_on_the_process_that_starts_the_stage(adapted: Path, tmp_path: Path) -> None:
    run_recipe(recipe(ALIGN, STAGE), tmp_path / "run", until="first")
    torch.manual_seed(99)
    run_recipe(recipe(ALIGN, STAGE), tmp_path / "run")
    assert tensor_hash(weights(tmp_path / "run", "second")) == tensor_hash(weights(adapted, "second"))


def test_a_trained_stage_goes_on_as_a_plain_one(adapted: Path, tmp_path: Path) -> None:
    start = str(adapted / "stages" / "second" / "tokenizer")
    plain: dict[str, Any] = {**STAGE, "lora": None, "teacher": "start", "steps": 1}
    run_recipe(recipe(plain, tokenizer={"load": start}), tmp_path / "run")
    # The student starts as its teacher, the merged model.
    assert measured(tmp_path / "run", "second", "semantic")[0][2] == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trains": ["adapter"]}, r"stages\[0\].lora.parts names 'encoder', which the stage does not train; add it to"),
        (
            {"trains": ["encoder", "encoder.norm"]},
            r"stages\[0\].trains names 'encoder.norm', and of 'encoder' only the",
        ),
        ({"lora": {"layers": "("}}, "lora.layers is '\\(', which is no regular expression"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe({**STAGE, "teacher": None, "losses": ["l1"], **changes})
