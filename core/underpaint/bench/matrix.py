"""A matrix: a YAML file of cells, each a recipe with overrides, multiplied by axes.

Nothing here imports torch: a matrix is read, multiplied out and checked before anything runs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs import validators as v

from underpaint.config.recipe import apply_overrides, plain_recipe, read_yaml, recipe_from_plain
from underpaint.config.schema import Recipe
from underpaint.config.structure import structure
from underpaint.errors import ConfigError, NotFoundError, UnderpaintError, suggest
from underpaint.run.recipes import check_recipe, read_recipe

__all__ = ["LOADS", "Cell", "CellConfig", "MatrixConfig", "PublishedConfig", "read_matrix", "resolve_cells"]

LOADS = "cell:"
"""What ``tokenizer.load`` begins with where it names a cell instead of a folder."""

# What alters neither models nor numbers.
_LABELS = ("name", "about", "trackers")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


def _named(_: Any, field: attrs.Attribute[Any], value: str) -> None:
    if not _NAME.fullmatch(value):
        raise ValueError(
            f"'{field.name}' is '{value}'; names become folders, and are of letters, digits, '_', '.', '+' and '-'."
        )


@attrs.frozen(kw_only=True)
class CellConfig:
    """One line of a matrix, before the axes multiply it.

    Attributes:
        name: Its name; the choices of the axes follow it, after dots.
        recipe: As ``underpaint train`` takes it: ``recipe:NAME`` or a YAML file.
        overrides: ``key=value`` texts. ``tokenizer.load=cell:NAME`` takes the tokenizer of an earlier cell; where axes
            multiply that one, NAME stands for the cell with the same choices, and what they change under ``tokenizer``
            and ``stages`` is changed there only.
        axes: Names of the axes that multiply it; None for all.
    """

    name: str = attrs.field(validator=_named)
    recipe: str
    overrides: tuple[str, ...] = ()
    axes: tuple[str, ...] | None = None


@attrs.frozen(kw_only=True)
class PublishedConfig:
    """Numbers of others. They stand in a table of their own.

    Attributes:
        name: What was measured.
        source: Where the numbers are published.
        values: The numbers by their name there.
    """

    name: str
    source: str
    values: Mapping[str, float]


@attrs.frozen(kw_only=True)
class MatrixConfig:
    """A matrix as it is written.

    Attributes:
        name: Its name.
        about: What it is, for the report.
        overrides: ``key=value`` texts for every cell, before its own.
        cells: What is run.
        axes: By name, what there is to choose from: for each choice its overrides, after the cell's own.
        published: Numbers of others to read beside the measured ones.
    """

    name: str = attrs.field(validator=_named)
    about: str = ""
    overrides: tuple[str, ...] = ()
    cells: tuple[CellConfig, ...] = attrs.field(validator=v.min_len(1))
    axes: Mapping[str, Mapping[str, tuple[str, ...]]] = attrs.field(factory=dict)
    published: tuple[PublishedConfig, ...] = ()

    def __attrs_post_init__(self) -> None:
        for axis, choices in self.axes.items():
            if not choices:
                raise ConfigError(f"axes.{axis} has nothing to choose from; name a choice, or leave the axis out.")
            for choice in choices:
                if not _NAME.fullmatch(choice):
                    raise ConfigError(
                        f"axes.{axis} has the choice '{choice}', which cannot be part of a folder's name."
                    )
        for index, cell in enumerate(self.cells):
            if any(other.name == cell.name for other in self.cells[:index]):
                raise ConfigError(f"cells[{index}].name is '{cell.name}', as another's is; rename one.")
            for axis in cell.axes or ():
                if axis not in self.axes:
                    raise ConfigError(
                        f"cells[{index}].axes names '{axis}'. {suggest(axis, self.axes) or 'There are no axes.'}"
                    )


@attrs.frozen(kw_only=True)
class Cell:
    """A recipe to run, checked.

    Attributes:
        name: Unique in the matrix.
        line: Name of the line of the matrix that it comes from.
        choices: What was chosen on each axis.
        source: The recipe that was changed.
        overrides: All changes, the last one winning.
        recipe: The result. Where it loads the tokenizer of a cell, ``tokenizer.load`` names that cell's folder.
        loads: Name of that cell; None where it loads none.
        hash: Hash of what decides the models: of all but name, ``about``, trackers and evaluation.
        identity: Hash of what decides the numbers: the evaluation too.
    """

    name: str
    line: str
    choices: Mapping[str, str]
    source: str
    overrides: tuple[str, ...]
    recipe: Recipe
    loads: str | None
    hash: str
    identity: str

    @property
    def folder(self) -> str:
        """Name of its run folder."""
        return f"{self.name}-{self.hash[:10]}"


def read_matrix(path: Path) -> MatrixConfig:
    """Read a matrix file.

    Raises:
        NotFoundError: There is no such file.
        ConfigError: Something in it is wrong; the message names its path.
    """
    if not path.is_file():
        raise NotFoundError(f"There is no matrix file '{path}'; give a YAML file with the keys 'name' and 'cells'.")
    return structure(read_yaml(path, "'name' and 'cells'"), MatrixConfig, "")


def resolve_cells(matrix: MatrixConfig, overrides: Sequence[str] = ()) -> list[Cell]:
    """Multiply a matrix out and check every recipe.

    Args:
        matrix: The matrix.
        overrides: ``key=value`` texts for every cell, after its own.

    Raises:
        UnderpaintError: A cell's recipe is wrong, or two cells are the same; the message names the cell.
    """
    cells: list[Cell] = []
    for line in matrix.cells:
        for choices in _choices(matrix, line):
            name = ".".join([line.name, *choices.values()])
            try:
                cell = _resolve(name, line, choices, [*_changes(matrix, line, choices), *overrides], cells)
            except UnderpaintError as error:
                raise type(error)(f"Cell '{name}' of matrix '{matrix.name}': {error}") from None
            for other in cells:
                if other.identity == cell.identity:
                    raise ConfigError(
                        f"The cells '{other.name}' and '{name}' of matrix '{matrix.name}' are the same recipe; remove "
                        "one, or let them differ, by their seed for instance."
                    )
            cells.append(cell)
    return cells


def _choices(matrix: MatrixConfig, line: CellConfig) -> Iterator[dict[str, str]]:
    axes = [axis for axis in matrix.axes if line.axes is None or axis in line.axes]
    for choice in itertools.product(*(matrix.axes[axis] for axis in axes)):
        yield dict(zip(axes, choice, strict=True))


def _changes(matrix: MatrixConfig, line: CellConfig, choices: Mapping[str, str]) -> list[str]:
    """Return the overrides of a cell: of all, its own, those of its choices."""
    changes = [*matrix.overrides, *line.overrides]
    tokenizer = apply_overrides(read_recipe(line.recipe), changes).get("tokenizer")
    load = tokenizer.get("load") if isinstance(tokenizer, dict) else None
    loads = isinstance(load, str) and load.startswith(LOADS)
    for axis, choice in choices.items():
        # A loaded tokenizer was changed in its own cell; here it has no parts to change, nor stages.
        changes += [o for o in matrix.axes[axis][choice] if not (loads and re.match(r"\s*(tokenizer|stages)\b", o))]
    return changes


def _resolve(
    name: str, line: CellConfig, choices: dict[str, str], overrides: list[str], earlier: Sequence[Cell]
) -> Cell:
    recipe = recipe_from_plain(apply_overrides(read_recipe(line.recipe), overrides))
    check_recipe(recipe)
    recipe = attrs.evolve(recipe, name=name)
    load = recipe.tokenizer.load
    loaded = None
    if load is not None and load.startswith(LOADS):
        loaded = _loaded(load.removeprefix(LOADS), choices, earlier)
        recipe = attrs.evolve(recipe, tokenizer=attrs.evolve(recipe.tokenizer, load=f"{LOADS}{loaded.folder}"))
    return Cell(
        name=name,
        line=line.name,
        choices=choices,
        source=line.recipe,
        overrides=tuple(overrides),
        recipe=recipe,
        loads=None if loaded is None else loaded.name,
        hash=_hash(recipe, (*_LABELS, "evaluation")),
        identity=_hash(recipe, _LABELS),
    )


def _loaded(name: str, choices: Mapping[str, str], earlier: Sequence[Cell]) -> Cell:
    """Return the earlier cell of that name, or the one of that line whose choices are among these."""
    for cell in earlier:
        if cell.name == name or (cell.line == name and cell.choices.items() <= choices.items()):
            return cell
    hint = suggest(name, [cell.name for cell in earlier]) or "This is the first cell."
    raise ConfigError(
        f"tokenizer.load is '{LOADS}{name}', and no cell before this one is that, or has its choices. {hint}"
    )


def _hash(recipe: Recipe, without: Sequence[str]) -> str:
    plain = {key: value for key, value in plain_recipe(recipe).items() if key not in without}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
