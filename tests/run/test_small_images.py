"""Training images below a size are left out, once for a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import underpaint
from tests.run.conftest import finish, tiny_recipe, train
from underpaint.config.recipe import dump_recipe
from underpaint.config.schema import Recipe
from underpaint.errors import DataError
from underpaint.run.data import open_run_data
from underpaint.run.pipeline import run_recipe
from underpaint.run.recipes import load_recipe
from underpaint.run.small_images import leave_out_small
from underpaint.training.log import read_rows
from underpaint.training.ranks import Ranks

SIDES = [40, 32, 31, 64, 8, 33]


def recipe(folder: Path, *overrides: str) -> Recipe:
    """Seven images, the last one broken."""
    for part in ("train", "validation"):
        (folder / part).mkdir(exist_ok=True)
    for index, side in enumerate(SIDES):
        pixels = np.random.default_rng(index).integers(0, 255, (side, 70 - side % 3, 3), dtype=np.uint8)
        image = Image.fromarray(pixels if index % 2 else pixels.transpose(1, 0, 2).copy())
        image.save(folder / "train" / f"{index}.png")
        image.save(folder / "validation" / f"{index}.png")
    (folder / "train" / "6.png").write_bytes(b"broken")
    return tiny_recipe(
        *(f"data.{part}={{name: files/folder, path: '{folder / part}'}}" for part in ("train", "validation")),
        *("diffusion=null", "data.min_side=32", "data.max_broken=1.0", "stages.align.batch=2"),
        *overrides,
    )


@pytest.fixture
def world():
    with Ranks("cpu") as ranks:
        yield ranks


def test_images_of_the_size_and_broken_ones_stay(tmp_path: Path, world: Ranks) -> None:
    whole = open_run_data(recipe(tmp_path).data)
    data = leave_out_small(whole, tmp_path / "small.json", world)
    assert data.train_indices.tolist() == [0, 1, 3, 5, 6]
    assert data.left_out == 2
    np.testing.assert_array_equal(data.validation_indices, whole.validation_indices)
    assert data.facts()["train"]["smaller_left_out"] == 2
    assert data.fingerprint() != whole.fingerprint()


def test_of_a_drawn_part_the_large_ones_stay(tmp_path: Path, world: Ranks) -> None:
    whole = open_run_data(recipe(tmp_path, "data.limit=4").data)
    data = leave_out_small(whole, tmp_path / "small.json", world)
    assert set(data.train_indices) == set(whole.train_indices) - {2, 4}


def test_without_the_setting_nothing_is_looked_at(tmp_path: Path, world: Ranks) -> None:
    data = open_run_data(recipe(tmp_path, "data.min_side=null").data)
    assert leave_out_small(data, tmp_path / "small.json", world) is data
    assert not (tmp_path / "small.json").exists()
    assert "smaller_left_out" not in data.facts()["train"]


def test_they_are_looked_at_once_until_data_or_setting_change(
    tmp_path: Path, world: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []

    def opened(*overrides: str) -> list[int]:
        data = open_run_data(recipe(tmp_path, *overrides).data)
        real = data.train.short_side
        monkeypatch.setattr(data.train, "short_side", lambda index: looked.append(index) or real(index))
        return leave_out_small(data, tmp_path / "small.json", world).train_indices.tolist()

    first = opened()
    assert looked == [0, 1, 2, 3, 4, 5, 6]
    assert opened() == first
    assert len(looked) == 7
    assert opened("data.min_side=64") == [3, 6]
    assert len(looked) == 14
    Image.new("RGB", (90, 90)).save(tmp_path / "train" / "7.png")
    assert opened("data.min_side=64") == [3, 6, 7]
    assert len(looked) == 22


def test_the_run_says_how_many_and_trains_on_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(tmp_path, "engine.log_every=1")
    run_recipe(config, tmp_path / "run", until="align")
    assert "data: 2 of 7 training images have a short side below 32 px and are left out\n" in capsys.readouterr().err
    assert len(read_rows(tmp_path / "run" / "stages" / "align" / "metrics.jsonl")) == 4
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert '"smaller_left_out": 2' in json.dumps(provenance)
    tokenizer = underpaint.load(tmp_path / "run" / "stages" / "align" / "tokenizer")
    assert "'smaller_left_out': 2" in tokenizer.about["facts"][0]


@pytest.mark.slow
def test_two_ranks_look_at_a_share_each_and_leave_out_the_same(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe(tmp_path)), encoding="utf-8")
    alone, both = (train(tmp_path / "recipe.yaml", tmp_path / f"run{n}", ranks=n) for n in (1, 2))
    for process in (alone, both):
        said = finish(process)
        assert process.returncode == 0, said
        assert said.count("data: 2 of 7 training images have a short side below 32 px and are left out\n") == 1
    one, two = (json.loads((tmp_path / f"run{n}" / "small_images.json").read_text()) for n in (1, 2))
    assert one == two
    assert one["small"] == [2, 4]


def test_no_image_left_is_one_sentence(tmp_path: Path, world: Ranks) -> None:
    config = recipe(tmp_path, "data.min_side=1000")
    (tmp_path / "train" / "6.png").unlink()
    with pytest.raises(DataError, match="All 6 training images have a short side below 1000 px; lower data.min_side"):
        leave_out_small(open_run_data(config.data), tmp_path / "small.json", world)


def test_vfm_vae_trains_on_images_that_its_crops_fit_into() -> None:
    """vfm_vae.md §4.6: images whose shorter side is at least 256 px."""
    assert load_recipe("recipe:vfm-vae").data.min_side == 256
