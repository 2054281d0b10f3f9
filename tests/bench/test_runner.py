"""Running a matrix: one cell that fails takes no other down, and nothing that is finished is run again."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.bench.conftest import Bench, resolved, write_matrix
from underpaint.bench.cells import cell_folder, read_record
from underpaint.errors import ConfigError, DataError, RunLockedError
from underpaint.training.lock import RunLock


def everything(*names: str) -> list[str]:
    return [f"{what} {name}" for name in names for what in ("train", "measure")]


def record(bench: Bench, path: Path, name: str, *overrides: str) -> Any:
    cells = {cell.name: cell for cell in resolved(path, *overrides)[1]}
    return read_record(bench.out, cells[name])


def test_every_cell_is_trained_and_measured_in_its_folder(bench: Bench) -> None:
    path = write_matrix(bench.folder)
    done = bench.run(path)
    assert (done.done, done.failed, done.stopped) == (("one", "second", "the-third"), (), None)
    assert bench.calls() == everything("one", "second", "the-third")
    for cell in resolved(path)[1]:
        folder = cell_folder(bench.out, cell)
        assert folder.name == f"{cell.name}-{cell.hash[:10]}"
        assert yaml.safe_load((folder / "config.yaml").read_text())["name"] == cell.name
    assert not (bench.out / "run.lock").exists()


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("raise", "RuntimeError: CUDA out of memory. Tried to allocate 3 GiB (exit code 1)"),
        ("exit", "a library said something (exit code 7)"),
        ("kill", "killed by SIGKILL, as the system does when memory runs out"),
        ("raise in measure", "ValueError: no speed (exit code 1)"),
    ],
)
def test_a_cell_that_fails_is_recorded_and_alone_run_again(bench: Bench, does: str, reason: str) -> None:
    path = write_matrix(bench.folder)
    done = bench.run(path, second=does)
    assert (done.done, done.failed) == (("one", "the-third"), ("second",))
    kept = record(bench, path, "second")
    assert (kept.state, kept.reason, kept.attempts) == ("failed", reason, 1)
    if does in ("raise", "exit"):
        assert kept.log[-1] in reason
    bench.calls()
    assert bench.run(path).done == ("one", "second", "the-third")
    # What was trained is not trained again for the sake of its timing.
    assert bench.calls() == (["measure second"] if does == "raise in measure" else everything("second"))
    kept = record(bench, path, "second")
    assert (kept.state, kept.reason, kept.attempts) == ("finished", "", 2)


def test_other_settings_are_another_cell_and_another_evaluation_is_measured_again(bench: Bench) -> None:
    path = write_matrix(bench.folder)
    bench.run(path)
    bench.run(path, "seed=1")
    assert len(list((bench.out / "cells").iterdir())) == 6
    bench.calls()
    bench.run(path)
    assert bench.calls() == []
    bench.run(path, "evaluation.images=5")
    assert bench.calls() == everything("one", "second", "the-third")
    assert len(list((bench.out / "cells").iterdir())) == 6


def test_a_cell_waits_for_the_tokenizer_that_it_loads(bench: Bench) -> None:
    generator = {
        "name": "generator",
        "overrides": [
            "tokenizer={load: cell:one}",
            "stages=[]",
            "diffusion={backbone: sit/S-1, conditioner: labels, steps: 5}",
        ],
    }
    path = write_matrix(bench.folder, [{"name": "one"}, generator, {"name": "last", "overrides": ["seed=1"]}])
    done = bench.run(path, one="exit")
    assert (done.done, done.failed, done.blocked) == (("last",), ("one",), ("generator",))
    assert bench.run(path).done == ("one", "generator", "last")
    cells = {cell.name: cell for cell in resolved(path)[1]}
    plain = yaml.safe_load((cell_folder(bench.out, cells["generator"]) / "config.yaml").read_text())
    assert plain["tokenizer"]["load"] == str(cell_folder(bench.out, cells["one"]) / "tokenizer")


def test_a_signal_reaches_the_cell_and_the_next_run_goes_on(bench: Bench) -> None:
    path = write_matrix(bench.folder)
    slow = cell_folder(bench.out, resolved(path)[1][1])

    def ask() -> None:
        while not (slow / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    asker = threading.Thread(target=ask)
    asker.start()
    done = bench.run(path, second="slow")
    asker.join()
    assert (done.done, done.failed, done.stopped) == (("one",), (), "SIGTERM")
    assert (slow / "progress").read_text() == "half"
    assert record(bench, path, "second").state == "interrupted"
    assert record(bench, path, "the-third") is None
    bench.calls()
    assert bench.run(path, second="slow").done == ("one", "second", "the-third")
    assert bench.calls() == everything("second", "the-third")


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def ranks_left(folder: Path) -> list[int]:
    """Return which of two ranks are still alive."""
    numbers = [int((folder / f"rank-{rank}").read_text()) for rank in range(2)]
    return [number for number in numbers if psutil.pid_exists(number) and psutil.Process(number).status() != "zombie"]


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_signal_reaches_the_ranks_of_a_launcher(bench: Bench, name: str) -> None:
    path = write_matrix(bench.folder)
    folder = cell_folder(bench.out, resolved(path)[1][0])

    def ask() -> None:
        while len(list(folder.glob("rank-*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.Signals[name])

    asker = threading.Thread(target=ask)
    asker.start()
    done = bench.run(path, launcher=TORCHRUN, one="ranks")
    asker.join()
    assert (done.failed, done.stopped) == ((), name)
    assert record(bench, path, "one").reason == f"interrupted by {name}"
    assert ranks_left(folder) == []
    assert sorted(file.name for file in folder.glob("saved-*")) == ["saved-0", "saved-1"]


def test_ranks_do_not_outlive_their_launcher(bench: Bench) -> None:
    path = write_matrix(bench.folder)
    done = bench.run(path, launcher=TORCHRUN, one="ranks alone", second="exit", **{"the-third": "exit"})
    assert "one" in done.failed
    assert "killed by SIGKILL" in record(bench, path, "one").reason
    assert ranks_left(cell_folder(bench.out, resolved(path)[1][0])) == []


def test_a_matrix_that_was_killed_goes_on(bench: Bench) -> None:
    path = write_matrix(bench.folder)
    bench.run(path)
    file = cell_folder(bench.out, resolved(path)[1][0]) / "cell.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "state": "running", "trained": False}))
    bench.calls()
    bench.run(path)
    assert bench.calls() == everything("one")


def test_two_runs_of_one_folder_are_refused(bench: Bench) -> None:
    path = write_matrix(bench.folder)
    bench.out.mkdir()
    with RunLock(bench.out), pytest.raises(RunLockedError, match="is in use by process"):
        bench.run(path)
    assert bench.calls() == []


def test_a_run_folder_is_no_place_for_a_matrix(bench: Bench) -> None:
    bench.out.mkdir()
    (bench.out / "config.yaml").write_text("name: mine")
    with pytest.raises(ConfigError, match="is the folder of a run"):
        bench.run(write_matrix(bench.folder))


def test_a_damaged_record_is_an_error(bench: Bench) -> None:
    path = write_matrix(bench.folder)
    bench.run(path)
    (cell_folder(bench.out, resolved(path)[1][0]) / "cell.json").write_text('{"state": "finishe')
    with pytest.raises(DataError, match="delete it"):
        bench.run(path)
