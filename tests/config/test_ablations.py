"""The shipped matrices: every cell is a recipe that can be run, and no two are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from underpaint.bench.matrix import Cell, read_matrix, resolve_cells
from underpaint.config.stages import LoraConfig
from underpaint.errors import ConfigError
from underpaint.interfaces.loss import StepSizes
from underpaint.registration.manager import manager
from underpaint.run.recipes import load_recipe
from underpaint.training.tokenizer_stage import tokenizer_losses

FOLDER = Path(__file__).parents[2] / "benchmarks" / "matrices"
MATRICES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def cells(name: str) -> list[Cell]:
    return resolve_cells(read_matrix(FOLDER / f"{name}.yaml"))


ALIGNTOK = cells("aligntok-ablations")
SMALL = [cell for cell in ALIGNTOK if cell.source.endswith("-small")]


@pytest.mark.parametrize("name", MATRICES)
def test_every_cell_resolves_and_no_two_are_the_same(name: str) -> None:
    matrix = read_matrix(FOLDER / f"{name}.yaml")
    assert matrix.name == name
    assert matrix.about
    assert len({cell.hash for cell in cells(name)}) == len(cells(name)) >= 5


def test_a_cell_that_is_wrong_would_be_found() -> None:
    with pytest.raises(ConfigError):
        load_recipe("recipe:aligntok-small", ["stages.perceive.losses.aligntok/semantic.distance=l3"])


def test_the_weights_of_the_paper_are_there() -> None:
    # aligntok.md §6.3: w_sp of 0, 1, 5 and 10.
    weights = set()
    for cell in ALIGNTOK:
        if cell.source == "recipe:aligntok":
            losses = {loss.name: loss for loss in cell.recipe.stages[1].losses}
            weights.add(losses["aligntok/semantic"].weight)
    assert weights == {0.0, 1.0, 5.0, 10.0}


def test_every_small_tokenizer_is_compared_and_no_diffusion_trained() -> None:
    shipped = {f"recipe:{recipe.name}" for recipe in manager().catalogue.recipes() if recipe.name.endswith("-small")}
    tokenizers = {name for name in shipped if load_recipe(name).stages}
    found = cells("tokenizers-small")
    assert {cell.source for cell in found} == tokenizers
    assert all(cell.recipe.diffusion is None for cell in found)


def test_the_tokenizers_at_256_px_are_the_small_ones_with_their_weights_converted() -> None:
    small, large = ({c.name: c for c in cells(f"tokenizers-{size}")} for size in ("small", "256"))
    assert {name: cell.source for name, cell in large.items()} == {name: cell.source for name, cell in small.items()}
    values = 3 * 256**2
    for name, cell in large.items():
        assert (cell.recipe.data.height, cell.recipe.data.width) == (256, 256)
        for stage in cell.recipe.stages:
            # A critic that begins after the stage has ended would be none.
            assert all(max(x.start, x.critic.start if x.critic else 0) < stage.steps for x in stage.losses)
            losses = {loss.name: loss for loss in stage.losses}
            if name in ("aligntok", "kl-vae", "va-vae"):
                assert losses["critics/patchgan"].adaptive.limit * values == pytest.approx(1e4, rel=2e-3)
            if name in ("kl-vae", "va-vae"):
                assert losses["kl"].weight * values == pytest.approx(1e-6, rel=2e-3)
            if name == "va-vae":
                assert losses["vf"].adaptive.limit * values == pytest.approx(1e8, rel=2e-3)


def test_every_small_generator_shares_one_tokenizer_and_is_sampled_alike() -> None:
    tokenizer, *others = cells("backbones-small")
    assert {cell.loads for cell in others} == {tokenizer.name}
    assert not any(cell.recipe.stages for cell in others)
    families = {cell.recipe.diffusion.backbone.name.partition("/")[0] for cell in others if cell.recipe.diffusion}
    assert families == {"lightningdit", "sit", "reg", "ditdh", "dit", "mmdit", "flux"}
    first = others[0].recipe
    for cell in others:
        assert (cell.recipe.evaluation.sampler, cell.recipe.evaluation.guidance) == (
            first.evaluation.sampler, first.evaluation.guidance,
        )  # fmt: skip
        assert (cell.recipe.evaluation.images, cell.recipe.evaluation.generation) == (
            first.evaluation.images, first.evaluation.generation,
        )  # fmt: skip


def test_low_rank_cells_adapt_the_encoder_in_the_second_stage_alone() -> None:
    found = {c.name: [stage.lora for stage in c.recipe.stages] for c in cells("aligntok-ablations") if "lora" in c.name}
    assert found.keys() == {"lora", "small-lora"}
    for first, second, third in found.values():
        assert first is None
        assert third is None
        assert second == LoraConfig(rank=16, alpha=16.0, parts=("encoder",))


@pytest.mark.slow
@pytest.mark.parametrize("cell", SMALL, ids=lambda cell: cell.name)
def test_losses_of_every_small_cell_fit_their_stages(cell: Cell) -> None:
    recipe = cell.recipe
    sizes = StepSizes(
        image=(64, 64), latent_channels=recipe.tokenizer.latent_channels, grid=(8, 8), feature_channels=(256,)
    )
    for index, stage in enumerate(recipe.stages):
        losses = tokenizer_losses(stage, index, torch.device("cpu"), sizes)
        assert [item.config for item in losses.items] == list(stage.losses)
