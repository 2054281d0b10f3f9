"""A loss that is not a number: which term it is in, is said in the error and at each step that is skipped."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from torch import Tensor

from tests.run.conftest import tiny_recipe
from underpaint.errors import ConfigError
from underpaint.interfaces.loss import StepTensors
from underpaint.run.pipeline import run_recipe
from underpaint.training.engine import NotFiniteError
from underpaint_losses.pixels import Mse

LOSSES = "stages.align.losses=[l1, mse]"


def test_the_term_that_is_not_finite_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = Mse.forward

    def forward(loss: Mse, step: StepTensors) -> dict[str, Tensor]:
        return {name: value * float("nan") for name, value in real(loss, step).items()}

    monkeypatch.setattr(Mse, "forward", forward)
    with (
        caplog.at_level(logging.WARNING, "underpaint"),
        pytest.raises(NotFiniteError, match=r"^The loss was not finite in 'mse' in 2 optimizer steps in a row"),
    ):
        run_recipe(tiny_recipe(LOSSES, "engine.max_bad_steps=2"), tmp_path / "run", until="align")
    assert "The loss was not finite in 'mse' after step 0; the step is skipped" in caplog.text


@pytest.mark.parametrize("weight", [".inf", "-.inf"])
def test_a_weight_must_be_finite(weight: str) -> None:
    with pytest.raises(ConfigError, match=r"stages\[0\]\.losses\[1\]: 'weight' is -?inf; give a finite number\."):
        tiny_recipe(f"stages.align.losses=[l1, {{name: mse, weight: {weight}}}]")
