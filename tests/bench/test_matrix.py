"""Matrices as they are written: products, names, hashes, tokenizers of other cells, mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.bench.conftest import resolved, write_matrix
from underpaint.bench.cells import select_cells
from underpaint.bench.matrix import Cell
from underpaint.errors import ConfigError, NotFoundError, UnderpaintError

AXES = {
    "encoder": {"thin": ["tokenizer.encoder.width=16"], "wide": ["tokenizer.encoder.width=64"]},
    "decoder": {"short": ["tokenizer.decoder.blocks=1"], "long": ["tokenizer.decoder.blocks=2"]},
}
GENERATOR = {
    "name": "generator",
    "overrides": [
        "tokenizer={load: cell:tokenizer}", "stages=[]", "diffusion={backbone: sit/S-1, conditioner: labels, steps: 5}",
    ],
    "axes": ["encoder", "backbone"],
}  # fmt: skip


def cells(folder: Path, lines: list[dict[str, Any]] | None = None, *overrides: str, **more: Any) -> list[Cell]:
    return resolved(write_matrix(folder, lines, **more), *overrides)[1]


def test_a_list_of_cells_is_run_in_its_order(tmp_path: Path) -> None:
    found = cells(tmp_path)
    assert [cell.name for cell in found] == ["one", "second", "the-third"]
    assert [cell.recipe.stages[0].steps for cell in found] == [4, 5, 6]


def test_axes_multiply_cells(tmp_path: Path) -> None:
    found = cells(tmp_path, [{"name": "a"}, {"name": "b", "overrides": ["seed=1"], "axes": ["decoder"]}], axes=AXES)
    assert [cell.name for cell in found] == [
        "a.thin.short", "a.thin.long", "a.wide.short", "a.wide.long", "b.short", "b.long",
    ]  # fmt: skip
    sizes = {
        cell.name: (cell.recipe.tokenizer.encoder.options["width"], cell.recipe.tokenizer.decoder.options["blocks"])
        for cell in found
        if cell.recipe.tokenizer.encoder and cell.recipe.tokenizer.decoder
    }
    assert sizes["a.wide.short"] == (64, 1)
    assert sizes["a.thin.long"] == (16, 2)
    assert sizes["b.long"] == (32, 2)
    assert dict(found[1].choices) == {"encoder": "thin", "decoder": "long"}


def test_later_overrides_win_those_of_the_command_last(tmp_path: Path) -> None:
    lines = [{"name": "a", "overrides": ["seed=2"]}]
    common = ["seed=1", "stages.align.steps=9"]
    (cell,) = cells(tmp_path, lines, overrides=common, axes={"x": {"y": ["evaluation.seed=3"]}})
    assert (cell.recipe.seed, cell.recipe.stages[0].steps, cell.recipe.evaluation.seed) == (2, 9, 3)
    (cell,) = cells(tmp_path, lines, "evaluation.seed=4", overrides=common, axes={"x": {"y": ["evaluation.seed=3"]}})
    assert cell.recipe.evaluation.seed == 4


def test_the_folder_follows_what_is_trained(tmp_path: Path) -> None:
    first = cells(tmp_path)
    assert [cell.folder for cell in cells(tmp_path)] == [cell.folder for cell in first]
    assert {a.folder for a in first}.isdisjoint({b.folder for b in cells(tmp_path, None, "seed=1")})
    measured = cells(tmp_path, None, "evaluation.images=5")
    assert [cell.folder for cell in measured] == [cell.folder for cell in first]
    assert {cell.identity for cell in measured}.isdisjoint({cell.identity for cell in first})
    told = cells(tmp_path, None, "about=Another text")
    assert [cell.identity for cell in told] == [cell.identity for cell in first]


def test_a_cell_takes_the_tokenizer_with_its_own_choices(tmp_path: Path) -> None:
    encoders = {"thin": ["tokenizer.encoder.width=16", "data.flip=true"], "wide": ["stages.align.steps=7"]}
    axes = {"encoder": encoders, "backbone": {"small": ["diffusion.batch=4"], "large": ["diffusion.batch=8"]}}
    tokenizer = {"name": "tokenizer", "axes": ["encoder"]}
    found = {cell.name: cell for cell in cells(tmp_path, [tokenizer, GENERATOR], axes=axes)}
    assert list(found) == [
        "tokenizer.thin", "tokenizer.wide",
        "generator.thin.small", "generator.thin.large", "generator.wide.small", "generator.wide.large",
    ]  # fmt: skip
    for name, cell in found.items():
        if name.startswith("generator"):
            loaded = found[f"tokenizer.{cell.choices['encoder']}"]
            assert (cell.loads, cell.recipe.tokenizer.load) == (loaded.name, f"cell:{loaded.folder}")
            # What the choice changes of the data holds for both; of the tokenizer, for the one that trains it.
            assert cell.recipe.data.flip == loaded.recipe.data.flip == (cell.choices["encoder"] == "thin")
            assert cell.recipe.stages == ()
    changed = {c.name: c for c in cells(tmp_path, [{**tokenizer, "overrides": ["seed=1"]}, GENERATOR], axes=axes)}
    assert changed["generator.wide.small"].hash != found["generator.wide.small"].hash


def test_selected_cells_bring_the_tokenizers_they_load(tmp_path: Path) -> None:
    found = cells(
        tmp_path, [{"name": "other"}, {"name": "tokenizer", "overrides": ["seed=1"]}, {**GENERATOR, "axes": []}]
    )
    assert [cell.name for cell in select_cells(found, ["gen*"])] == ["tokenizer", "generator"]
    assert [cell.name for cell in select_cells(found, [])] == ["other", "tokenizer", "generator"]
    with pytest.raises(NotFoundError, match=r"No cell matches 'othr'\. Did you mean 'other'\?"):
        select_cells(found, ["othr"])


@pytest.mark.parametrize(
    ("lines", "more", "message"),
    [
        ([{"name": "a", "overides": []}], {}, r"cells\[0\] has no key 'overides'. Did you mean 'overrides'"),
        ([{"name": "a b"}], {}, r"cells\[0\]: 'name' is 'a b'"),
        ([{"name": "../a"}], {}, "names become folders"),
        ([{"name": "a", "overrides": "seed=1"}], {}, r"cells\[0\].overrides must be a list"),
        ([{"name": "a", "axes": ["encodr"]}], {"axes": AXES},
         r"cells\[0\].axes names 'encodr'. Did you mean 'encoder'"),
        ([{"name": "a"}], {"axes": {"x": {}}}, "axes.x has nothing to choose from"),
        ([{"name": "a"}], {"axes": {"x": {"b/c": []}}}, "axes.x has the choice 'b/c'"),
        ([{"name": "a"}], {"abuot": "x"}, "no key 'abuot'. Did you mean 'about'"),
        ([{"name": "a"}], {"published": [{"name": "x", "values": {"rFID": "low"}, "source": "y"}]},
         r"published\[0\].values.rFID must be a number"),
        ([{"name": "a"}, {"name": "b", "overrides": ["stages.algin.steps=3"]}], {},
         "Cell 'b' of matrix 'trio': .*'stages.algin' names no element"),
        ([{"name": "a", "overrides": ["tokenizer.encoder=tiny/vitt"]}], {},
         "Cell 'a' .*There is no encoder 'tiny/vitt'"),
        ([{"name": "a"}, {"name": "a", "overrides": ["seed=1"]}], {}, r"cells\[1\].name is 'a', as another's is"),
        ([{"name": "a"}, {"name": "b", "overrides": ["stages.align.steps=4"]}], {},
         "'a' and 'b' .*are the same recipe"),
        ([{"name": "tokeniser"}, {**GENERATOR, "axes": []}], {},
         "Cell 'generator' .*'cell:tokenizer', and no cell before .*Did you mean 'tokeniser'"),
        ([{**GENERATOR, "axes": []}], {}, "This is the first cell"),
    ],
)  # fmt: skip
def test_mistakes_name_their_place(
    lines: list[dict[str, Any]], more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnderpaintError, match=message):
        cells(tmp_path, lines, **more)


def test_a_file_that_is_no_matrix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="There is no matrix file"):
        resolved(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- {name: a, recipe: b}\n")
    with pytest.raises(ConfigError, match="must hold a mapping with keys such as 'name' and 'cells'"):
        resolved(tmp_path / "list.yaml")
    (tmp_path / "empty.yaml").write_text("{name: a, cells: []}")
    with pytest.raises(ConfigError):
        resolved(tmp_path / "empty.yaml")
