"""Trackers: what was logged can be read back."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import underpaint
from underpaint import ConfigError, PluginError, Tracker

PICTURE = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def tensorboard(folder: Path) -> Tracker:
    return underpaint.create("tracker", "tensorboard", folder=folder, run="a run")


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    tracker = tensorboard(tmp_path / "tracker")
    tracker.scalars(1, {"align/l1": 0.5, "align/lr": 1e-4})
    tracker.scalars(2, {"align/l1": 0.25})
    tracker.image(2, "reconstructions", PICTURE)
    tracker.close()
    events = read(tmp_path / "tracker")
    assert [(e.step, e.value) for e in events.Scalars("align/l1")] == [(1, 0.5), (2, 0.25)]
    assert [e.value for e in events.Scalars("align/lr")] == [pytest.approx(1e-4, rel=1e-6)]
    (shown,) = events.Images("reconstructions")
    assert shown.step == 2
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(shown.encoded_image_string))), PICTURE)


def test_tensorboard_keeps_what_a_run_wrote_before_it_was_resumed(tmp_path: Path) -> None:
    for step in (1, 2):
        tracker = tensorboard(tmp_path)
        tracker.scalars(step, {"loss": float(step)})
        tracker.close()
    events = EventAccumulator(str(tmp_path), purge_orphaned_data=False)
    events.Reload()
    assert {e.step for e in events.Scalars("loss")} == {1, 2}


class FakeRun:
    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.metrics: list[tuple[str, str]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    runs: list[FakeRun] = []

    def init(**arguments: Any) -> FakeRun:
        runs.append(FakeRun(arguments))
        return runs[-1]

    fake = types.ModuleType("wandb")
    fake.__dict__.update(init=init, Image=lambda image: ("picture", image))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return runs


def test_wandb_receives_numbers_and_pictures_with_their_step(tmp_path: Path, wandb_runs: list[FakeRun]) -> None:
    tracker = underpaint.create(
        "tracker", "wandb", folder=tmp_path / "w", run="a run", project="p", entity="me", mode="offline"
    )
    tracker.scalars(10, {"align/l1": 0.5})
    tracker.scalars(1, {"detail/l1": 0.25})  # the next stage counts from the beginning
    tracker.image(1, "samples", PICTURE)
    tracker.close()
    (run,) = wandb_runs
    wanted = {"project": "p", "entity": "me", "mode": "offline", "name": "a run", "dir": str(tmp_path / "w")}
    assert wanted.items() <= run.arguments.items()
    assert run.metrics == [("*", "step")]
    assert run.logged[:2] == [{"align/l1": 0.5, "step": 10}, {"detail/l1": 0.25, "step": 1}]
    kind, image = run.logged[2]["samples"]
    assert kind == "picture"
    np.testing.assert_array_equal(image, PICTURE)
    assert run.finished


def test_a_resumed_run_goes_on_under_its_wandb_id(tmp_path: Path, wandb_runs: list[FakeRun]) -> None:
    for folder in ("a", "a", "b"):
        underpaint.create("tracker", "wandb", folder=tmp_path / folder, run="r")
    first, again, other = (run.arguments["id"] for run in wandb_runs)
    assert first == again != other
    assert wandb_runs[1].arguments["resume"] == "allow"


def test_missing_wandb_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(PluginError, match=r"pip install 'underpaint\[wandb\]'"):
        underpaint.create("tracker", "wandb", folder=tmp_path, run="r")


def test_wandb_options_are_checked_without_wandb() -> None:
    with pytest.raises(ConfigError, match="sometimes"):
        underpaint.create("tracker", "wandb", folder=Path(), run="r", mode="sometimes")
