"""Which numbers stand in one column, which of them is the best, and what the report shows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.bench.conftest import CELLS, Bench, resolved, write_matrix
from tests.report.test_report_page import Page
from underpaint.bench.page import write_matrix_report
from underpaint.bench.results import Results, columns, read_results
from underpaint.evaluation.protocol import Number


def number(value: float, better: bool | None = True, name: str = "psnr", **protocol: Any) -> Number:
    return Number(name=name, value=value, protocol={"images": 10, **protocol}, higher_is_better=better)


def test_one_protocol_is_one_column_and_its_best_is_known() -> None:
    rows = {"a": [number(20.0), number(3.0, False, "rFID")], "b": [number(21.0), number(2.0, False, "rFID")]}
    psnr, fid = columns(rows)
    assert (psnr.name, psnr.note, psnr.best) == ("psnr", "", {"b"})
    assert (fid.best, {row: n.value for row, n in fid.values.items()}) == ({"b"}, {"a": 3.0, "b": 2.0})


def test_another_protocol_is_another_column_that_says_in_what() -> None:
    first, second = columns({"a": [number(20.0)], "b": [number(25.0, images=500)]})
    assert (first.note, second.note) == ("images 10", "images 500")
    assert (set(first.values), set(second.values)) == ({"a"}, {"b"})
    # Alone in its column, a value is better than nothing.
    assert first.best == second.best == frozenset()


def test_force_joins_protocols() -> None:
    (column,) = columns({"a": [number(20.0)], "b": [number(25.0, images=500)]}, force=True)
    assert column.best == {"b"}
    assert len(column.protocols) == 2


@pytest.mark.parametrize(("values", "best"), [((2.0, 2.0, 1.0), {"a", "b"}), ((2.0, 2.0), set()), ((2.0,), set())])
def test_equal_values_are_equally_good(values: tuple[float, ...], best: set[str]) -> None:
    (column,) = columns({row: [number(value)] for row, value in zip("abc", values, strict=False)})
    assert column.best == best


def test_what_has_no_direction_has_no_best() -> None:
    (column,) = columns({"a": [number(1.0, None)], "b": [number(2.0, None)]})
    assert column.best == frozenset()


# ------------------------------------------------------------------------------------------------ pages

PUBLISHED = [{"name": "Theirs <b>", "values": {"psnr": 99.25}, "source": "Somebody 2031"}]


def results(bench: Bench, *overrides: str, **behaviour: str) -> Results:
    path = write_matrix(bench.folder, about="Some <cells> & more", published=PUBLISHED)
    bench.run(path, *overrides, **behaviour)
    return read_results(*resolved(path, *overrides), bench.out)


def page(found: Results, **options: bool) -> Page:
    return Page(write_matrix_report(found, **options).read_text(encoding="utf-8"))


def test_the_last_stage_is_the_result_and_the_others_are_kept(bench: Bench) -> None:
    cell = results(bench).cells[0]
    assert [(n.name, n.value) for n in cell.final] == [("psnr", 3.0)]
    assert {stage: [n.value for n in numbers] for stage, numbers in cell.stages.items()} == {
        "align": [2.0], "perceive": [3.0],
    }  # fmt: skip
    assert [n.name for n in cell.models] == ["encoder, M parameters", "encode img/s"]


def test_the_page_shows_every_cell_and_needs_no_other_file(bench: Bench) -> None:
    shown = page(results(bench, second="exit"))
    for text in ("one", "the-third", "second", "failed: a library said something (exit code 7)", "100.0 ± 1.0"):
        assert text in shown.text, text
    assert "Some <cells> & more" in shown.text
    assert "2 finished, 1 failed" in shown.text
    assert all(link.startswith(("data:image/", "#", "cells/")) for link in shown.links), shown.links


def test_the_page_says_which_images_every_cell_saw(bench: Bench) -> None:
    one = "Images of 32×32 pixels: 1,900 of scenes to train on, 100 of scenes held out"
    assert f"{one}." in page(results(bench)).text
    cells = [CELLS[0], {**CELLS[1], "overrides": ["data.size=[16, 32]"]}]
    path = write_matrix(bench.folder, cells)
    bench.run(path)
    text = page(read_results(*resolved(path), bench.out)).text
    assert f"{one}: one." in text
    assert "Images of 16×32 pixels: 1,900 of scenes to train on, 100 of scenes held out: second." in text


def test_values_of_failed_cells_are_nowhere(bench: Bench) -> None:
    # It has measured before it fails: psnr is the length of its name.
    found = results(bench, second="raise in measure")
    text = page(found).text
    assert "9.000" in text
    assert "6.000" not in text
    plain = json.loads((bench.out / "results.json").read_text())
    states = {cell["name"]: (cell["state"], "numbers" in cell) for cell in plain["cells"]}
    assert states == {"one": ("finished", True), "second": ("failed", False), "the-third": ("finished", True)}


def test_published_numbers_stand_apart(bench: Bench) -> None:
    write_matrix_report(results(bench))
    text = (bench.out / "report.md").read_text()
    before, after = text.split("## Published elsewhere, not measured here")
    assert "99.25" not in before
    assert "| Theirs <b> | 99.25 | Somebody 2031 |" in after
    assert "**9.000**" in before  # the longest name; 99.25 is in no competition


def test_different_protocols_stand_in_different_columns(bench: Bench) -> None:
    cells = [*CELLS[:2], {**CELLS[2], "overrides": ["stages.align.steps=6", "evaluation.images=4"]}]
    path = write_matrix(bench.folder, cells)
    bench.run(path)
    found = read_results(*resolved(path), bench.out)
    text = page(found).text
    assert "psnr (images 6)" in text
    assert "psnr (images 4)" in text
    forced = page(found, force=True).text
    assert "psnr (images" not in forced
    assert "--force" in forced


def test_reconstructions_of_the_same_images_are_one_picture(bench: Bench) -> None:
    write_matrix_report(results(bench))
    sheet = np.asarray(Image.open(bench.out / "figures" / "reconstructions-1.png"))
    assert sheet.shape == (3 * 8 + 2 * 2, 4 * 8 + 3 * 2, 3)
    originals = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(sheet[:8, :8], originals[0])
    np.testing.assert_array_equal(sheet[20:, 30:], originals[2] // len("the-third"))


def test_json_holds_numbers_with_protocol_speed_and_provenance(bench: Bench) -> None:
    write_matrix_report(results(bench))
    cell = json.loads((bench.out / "results.json").read_text())["cells"][0]
    assert cell["numbers"][0]["protocol"] == {"metric": "psnr", "images": 6, "data": "scenes"}
    assert cell["training"]["align"]["images_per_second"] == 10.0
    assert cell["training"]["align"]["memory_gib"] == 2.0
    assert cell["provenance"]["environments"][0]["machine"] == {"cpu_cores": 2}
    assert cell["recipe"].startswith("name: one\n")
    assert cell["seconds"] > 0


def test_cells_of_other_settings_are_not_shown_and_pointed_out(bench: Bench) -> None:
    results(bench, "seed=1")
    path = bench.folder / "matrix.yaml"
    found = read_results(*resolved(path), bench.out)
    assert [cell.state for cell in found.cells] == ["not run"] * 3
    text = page(found).text
    assert "3 not run" in text
    assert "The folder holds 3 cells of other settings" in text


def test_another_evaluation_is_no_result(bench: Bench) -> None:
    results(bench)
    found = read_results(*resolved(bench.folder / "matrix.yaml", "evaluation.images=3"), bench.out)
    assert [(cell.state, cell.why) for cell in found.cells] == [
        ("not run", "it was measured with another evaluation")
    ] * 3
