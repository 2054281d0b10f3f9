"""A stage with a guard: what is logged, and that an interrupted one drops the same steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.run.test_stages import FIRST, PATCHGAN, Cut, cut, measured, recipe, weights
from underpaint.errors import ConfigError
from underpaint.interfaces.loss import StepTensors
from underpaint.run.pipeline import run_recipe
from underpaint.weights import tensor_hash
from underpaint_losses.pixels import L1

STAGE: dict[str, Any] = {**FIRST, "losses": ["l1", PATCHGAN], "equivariance": None, "steps": 5, "guard": {}}
JUMPS = (2, 4)


@pytest.fixture(autouse=True)
def jumping(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is the first step after the checkpoint of two."""
    real = L1.forward

    def forward(loss: L1, step: StepTensors) -> dict[str, Tensor]:
        factor = 100.0 if step.step in JUMPS else 1.0
        return {name: value * factor for name, value in real(loss, step).items()}

    monkeypatch.setattr(L1, "forward", forward)


def test_dropped_steps_are_counted_and_those_of_critics_too(tmp_path: Path) -> None:
    run_recipe(recipe(STAGE), tmp_path / "run")
    rows = measured(tmp_path / "run", "first", "skipped", "skipped_jump")
    assert [row[2:] for row in rows] == [[0, 0], [0, 0], [1, 1], [1, 1], [2, 2]]
    run_recipe(recipe({**STAGE, "guard": {"critic": 1e-3, "after": 3}}), tmp_path / "critic")
    # The fourth step drops the critic's alone, the fifth the model's as well.
    rows = measured(tmp_path / "critic", "first", "skipped", "skipped_jump")
    assert [row[2:] for row in rows] == [[0, 0], [0, 0], [0, 0], [0, 1], [1, 2]]


def test_a_stage_without_a_guard_drops_nothing_and_says_nothing_of_it(tmp_path: Path) -> None:
    run_recipe(recipe({**STAGE, "guard": None}), tmp_path / "run")
    assert [row[2:] for row in measured(tmp_path / "run", "first", "skipped", "skipped_jump")] == [[0, None]] * 5


@pytest.mark.parametrize("zero", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_interrupted_training_goes_on_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero: int) -> None:
    config = recipe(STAGE, engine={"zero": zero})
    run_recipe(config, tmp_path / "whole")
    cut(monkeypatch, "first", 2)
    with pytest.raises(Cut):
        run_recipe(config, tmp_path / "run")
    run_recipe(config, tmp_path / "run")
    assert tensor_hash(weights(tmp_path / "run", "first")) == tensor_hash(weights(tmp_path / "whole", "first"))
    for name in ("run", "whole"):
        rows = measured(tmp_path / name, "first", "skipped_jump")
        assert [row[2] for row in rows] == [0, 0, 1, 1, 2]


def test_a_factor_that_drops_what_stays_the_same_is_refused() -> None:
    with pytest.raises(ConfigError, match="factor"):
        recipe({**STAGE, "guard": {"factor": 1.0}})
