"""The shipped ablation matrices: every cell is a recipe that can be run, and no two are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from underpaint.config.recipe import plain_recipe
from underpaint.config.schema import LoraConfig
from underpaint.errors import ConfigError
from underpaint.interfaces.loss import StepSizes
from underpaint.run.recipes import load_recipe
from underpaint.training.tokenizer_stage import tokenizer_losses

FOLDER = Path(__file__).parents[2] / "benchmarks" / "matrices"


def cells(name: str) -> list[dict[str, Any]]:
    plain = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    assert isinstance(plain, list)
    return plain


ALIGNTOK = cells("aligntok-ablations.yaml")
SMALL = [cell for cell in ALIGNTOK if cell["recipe"].endswith("-small")]


@pytest.mark.parametrize("cell", ALIGNTOK, ids=lambda cell: cell["name"])
def test_every_cell_resolves(cell: dict[str, Any]) -> None:
    assert cell.keys() == {"name", "recipe", "overrides"}
    load_recipe(cell["recipe"], cell["overrides"])


def test_a_cell_that_is_wrong_would_be_found() -> None:
    with pytest.raises(ConfigError):
        load_recipe("recipe:aligntok-small", ["stages.perceive.losses.aligntok/semantic.distance=l3"])


def test_no_two_cells_are_the_same() -> None:
    assert len({cell["name"] for cell in ALIGNTOK}) == len(ALIGNTOK)
    seen: list[dict[str, Any]] = []
    for cell in ALIGNTOK:
        plain = plain_recipe(load_recipe(cell["recipe"], cell["overrides"]))
        assert plain not in seen, cell["name"]
        seen.append(plain)


def test_the_weights_of_the_paper_are_there() -> None:
    # aligntok.md §6.3: w_sp of 0, 1, 5 and 10.
    weights = set()
    for cell in ALIGNTOK:
        if cell["recipe"] == "recipe:aligntok":
            losses = {loss.name: loss for loss in load_recipe(cell["recipe"], cell["overrides"]).stages[1].losses}
            weights.add(losses["aligntok/semantic"].weight)
    assert weights == {0.0, 1.0, 5.0, 10.0}


def test_low_rank_cells_adapt_the_encoder_in_the_second_stage_alone() -> None:
    found = {
        cell["name"]: [stage.lora for stage in load_recipe(cell["recipe"], cell["overrides"]).stages]
        for cell in ALIGNTOK
        if "lora" in cell["name"]
    }
    assert found.keys() == {"lora", "small-lora"}
    for first, second, third in found.values():
        assert first is None
        assert third is None
        assert second == LoraConfig(rank=16, alpha=16.0, parts=("encoder",))


@pytest.mark.slow
@pytest.mark.parametrize("cell", SMALL, ids=lambda cell: cell["name"])
def test_losses_of_every_small_cell_fit_their_stages(cell: dict[str, Any]) -> None:
    recipe = load_recipe(cell["recipe"], cell["overrides"])
    sizes = StepSizes(
        image=(64, 64), latent_channels=recipe.tokenizer.latent_channels, grid=(8, 8), feature_channels=(256,)
    )
    for index, stage in enumerate(recipe.stages):
        losses = tokenizer_losses(stage, index, torch.device("cpu"), sizes)
        assert [item.config for item in losses.items] == list(stage.losses)
