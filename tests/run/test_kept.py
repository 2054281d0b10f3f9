"""What a run measured and how long it took outlive its sessions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.run.conftest import tiny_recipe
from underpaint.evaluation.protocol import protocol_id, read_numbers
from underpaint.run.pipeline import run_recipe
from underpaint.training.loop import Stopped


def names(run: Path) -> list[str]:
    return [number.name for number in read_numbers(run / "report" / "numbers.json")]


def seconds(run: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((run / "provenance.json").read_text())["seconds"]
    return found


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("until", ["align", "latents", None])
def test_numbers_pictures_and_times_of_later_steps_are_kept(finished: Path, again: Path, until: str | None) -> None:
    run_recipe(tiny_recipe(), again, until=until)
    assert names(again) == names(finished)
    assert any(name.endswith(" after refine") for name in names(again))
    assert any("Frechet" in name for name in names(again))
    before, now = seconds(finished), seconds(again)
    # What is finished is not timed again, as if it had taken no time.
    assert now.keys() == before.keys() == {"align", "perceive", "refine", "latents", "diffusion", "samples"}
    assert all(now[name] == before[name] for name in ("align", "perceive", "refine", "diffusion"))
    first, second = (np.load(run / "samples" / "reconstructions.npz") for run in (finished, again))
    with first, second:
        assert sorted(first.files) == sorted(second.files)
        assert all(np.array_equal(first[name], second[name]) for name in first.files)
    assert "after refine" in (again / "report" / "index.html").read_text()


def test_what_was_measured_of_a_stage_that_is_gone_is_left_out(again: Path) -> None:
    shutil.rmtree(again / "stages" / "refine")
    shutil.rmtree(again / "generator")
    run_recipe(tiny_recipe(), again, until="align")
    assert {name.rpartition(" after ")[2] for name in names(again)} == {"align", "perceive"}
    with np.load(again / "samples" / "reconstructions.npz") as file:
        assert "reconstructions_refine" not in file.files


def test_numbers_of_other_images_are_left_out(again: Path) -> None:
    path = again / "report" / "numbers.json"
    text = path.read_text()
    held = json.loads(text)
    kept = held["numbers"][0]
    kept["protocol"]["data_hash"] = "of others"
    held["numbers"] = [{**kept, "name": "psnr after refine", "protocol_id": None}]
    held["numbers"][0]["protocol_id"] = protocol_id(kept["protocol"])
    path.write_text(json.dumps(held))
    run_recipe(tiny_recipe(), again, until="align")
    assert all(name.endswith(" after align") for name in names(again))


def test_numbers_that_cannot_be_read_are_named_and_left_out(again: Path, caplog: pytest.LogCaptureFixture) -> None:
    (again / "report" / "numbers.json").write_text("{")
    run_recipe(tiny_recipe(), again, until="align")
    assert all(name.endswith(" after align") for name in names(again))
    assert "earlier sessions measured cannot be read and is left out" in caplog.text
    assert "numbers.json" in caplog.text


def test_the_time_of_a_stage_is_that_of_all_its_sessions(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from underpaint.training import loop

    clock = [0.0]
    monkeypatch.setattr("underpaint.run.kept.time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def train(**arguments: object) -> object:
        clock[0] += 10.0
        if arguments["start"] == 0:
            loop.train_loop(**{**arguments, "steps": 2})  # type: ignore[arg-type]
            raise Stopped("SIGTERM", None)
        return loop.train_loop(**arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("underpaint.run.training.train_loop", train)
    with pytest.raises(Stopped):
        run_recipe(tiny_recipe(), tmp_path / "run", until="align")
    assert seconds(tmp_path / "run")["align"] == 10.0
    run_recipe(tiny_recipe(), tmp_path / "run", until="align")
    assert seconds(tmp_path / "run")["align"] == 20.0
