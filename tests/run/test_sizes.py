"""Images smaller than the crop: a few are enlarged, most of them are a mistake."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.run.conftest import tiny_recipe
from underpaint.config.schema import Recipe
from underpaint.errors import DataError
from underpaint.run.data import check_sizes, open_run_data
from underpaint.run.pipeline import run_recipe


def recipe(folder: Path, sizes: list[tuple[int, int]], *overrides: str) -> Recipe:
    (folder / "data").mkdir(exist_ok=True)
    for index, size in enumerate(sizes):
        pixels = np.random.default_rng(index).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "data" / f"{index}.png")
    return tiny_recipe(f"data.train={{name: files/folder, path: '{folder / 'data'}'}}", "diffusion=null", *overrides)


def test_a_run_on_small_images_ends_before_training(tmp_path: Path) -> None:
    small = recipe(tmp_path, [(24, 40)] * 10)
    with pytest.raises(DataError) as caught:
        run_recipe(small, tmp_path / "run")
    assert str(caught.value) == (
        "8 of 8 training images that were looked at are smaller than the crop of 32×32 px, and typically 24×40 px; "
        "set data.size to 24 or less, or data.enlarge to true."
    )
    assert not (tmp_path / "run" / "stages").exists()


def test_they_may_be_enlarged(tmp_path: Path) -> None:
    small = recipe(tmp_path, [(24, 40)] * 10, "data.enlarge=true", "stages.align.batch=4")
    run_recipe(small, tmp_path / "run", until="align")


@pytest.mark.parametrize("sizes", [[(32, 32)] * 10, [(32, 33)] * 9 + [(8, 9)]])
def test_a_few_do_not_matter(tmp_path: Path, sizes: list[tuple[int, int]]) -> None:
    check_sizes(open_run_data(recipe(tmp_path, sizes).data), 8)


def test_where_no_size_fits_none_is_named(tmp_path: Path) -> None:
    data = open_run_data(recipe(tmp_path, [(12, 12)] * 10).data)
    with pytest.raises(DataError, match=r"typically 12×12 px; use larger images, or set data\.enlarge to true\.$"):
        check_sizes(data, 16)
