"""``underpaint sample`` replaces earlier samples, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tests.models.test_folders import make_generator

from underpaint.cli.models import sample
from underpaint.models.folders import save_generator


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = make_generator()
    generator.grid = (4, 4)
    folder = tmp_path_factory.mktemp("model") / "generator"
    save_generator(generator, folder)
    return folder


def draw(model: Path, out: Path, *options: str) -> Result:
    fixed = ["--out", str(out), "--count", "2", "--steps", "1", "--device", "cpu"]
    return CliRunner().invoke(sample, [str(model), *fixed, *options])


def test_samples_replace_samples_alone(model: Path, tmp_path: Path) -> None:
    assert draw(model, tmp_path / "new").exit_code == 0
    assert draw(model, tmp_path / "new", "--seed", "7").exit_code == 0
    samples = tmp_path / "samples.npz"
    # As a run keeps its own.
    np.savez_compressed(samples, images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.arange(2))
    before = samples.read_bytes()
    result = draw(model, tmp_path)
    assert result.exit_code == 1
    assert f"'{samples}' exists and was not written by 'underpaint sample'; choose" in str(result.exception)
    assert samples.read_bytes() == before


def test_a_picture_alone_is_not_replaced(model: Path, tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_bytes(b"mine")
    result = draw(model, tmp_path)
    assert result.exit_code == 1
    assert "grid.png' exists without the samples.npz" in str(result.exception)
    assert (tmp_path / "grid.png").read_bytes() == b"mine"
    assert not (tmp_path / "samples.npz").exists()
