"""A matrix of three cells, and processes that take no time."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import yaml

from tests.run.conftest import TINY
from underpaint.bench import runner
from underpaint.bench.matrix import Cell, MatrixConfig, read_matrix, resolve_cells
from underpaint.bench.runner import MatrixRun, run_cells

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).with_name("fake.py")

CELLS: list[dict[str, Any]] = [
    {"name": "one"},
    {"name": "second", "overrides": ["stages.align.steps=5"]},
    {"name": "the-third", "overrides": ["stages.align.steps=6"]},
]


def write_matrix(folder: Path, cells: list[dict[str, Any]] | None = None, **more: Any) -> Path:
    """Write a matrix file, and the recipe of its cells beside it."""
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump({**copy.deepcopy(TINY), "diffusion": None}, sort_keys=False))
    path = folder / "matrix.yaml"
    plain = {"name": "trio", "cells": [{"recipe": str(recipe), **c} for c in copy.deepcopy(cells or CELLS)], **more}
    path.write_text(yaml.safe_dump(plain, sort_keys=False))
    return path


def resolved(path: Path, *overrides: str) -> tuple[MatrixConfig, list[Cell]]:
    """Read and resolve a matrix file."""
    matrix = read_matrix(path)
    return matrix, resolve_cells(matrix, overrides)


@attrs.define
class Bench:
    """A matrix whose processes are `fake.py`."""

    folder: Path
    said: list[str] = attrs.field(factory=list)

    @property
    def out(self) -> Path:
        """Folder of the matrix."""
        return self.folder / "out"

    def run(
        self, path: Path, *overrides: str, launcher: Sequence[str] = (sys.executable,), **behaviour: str
    ) -> MatrixRun:
        """Run the matrix; `behaviour` says what the cells do."""
        self.out.mkdir(exist_ok=True)
        (self.out / "behaviour.json").write_text(json.dumps(behaviour))
        _, cells = resolved(path, *overrides)
        return run_cells(cells, self.out, [*launcher, str(FAKE)], self.said.append)

    def calls(self) -> list[str]:
        """Return what was called since the last question."""
        file = self.out / "calls.txt"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A folder for a matrix, with processes that take no time."""
    monkeypatch.setattr(runner, "_MEASURE", (sys.executable, str(FAKE), "measure"))
    return Bench(tmp_path)
