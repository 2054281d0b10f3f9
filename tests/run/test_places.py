"""Run folders in odd places, and clocks that go backwards: they work, or give one clear sentence."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import underpaint
from tests.run.conftest import recipe_file, tiny_recipe
from underpaint.cli import main as cli
from underpaint.run import provenance
from underpaint.run.pipeline import run_recipe
from underpaint.training import loop
from underpaint.weights import tensor_hash


class Cut(Exception):
    """Ends a run in the middle, as a kill would."""


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the next stage end after so many steps, or none."""
    last = [0]

    def cut_short(**arguments: Any) -> object:
        steps, last[0] = last[0], 0
        if not steps:
            return loop.train_loop(**arguments)
        loop.train_loop(**{**arguments, "steps": steps})
        raise Cut

    monkeypatch.setattr("underpaint.run.training.train_loop", cut_short)
    return lambda steps: last.__setitem__(0, steps)


def same_as_finished(finished: Path, run: Path) -> bool:
    tokenizers = (underpaint.load(root / "stages" / "align" / "tokenizer") for root in (finished, run))
    first, second = (tensor_hash(tokenizer.state_dict()) for tokenizer in tokenizers)
    return first == second


def test_a_run_goes_on_through_a_link_with_spaces_and_other_letters(
    finished: Path, tmp_path: Path, cut: Callable[[int], None]
) -> None:
    (tmp_path / "große Platte 日本").mkdir()
    link = tmp_path / "mein Lauf é"
    link.symlink_to(tmp_path / "große Platte 日本" / "run")
    cut(2)
    # The link points nowhere yet.
    with pytest.raises(Cut):
        run_recipe(tiny_recipe(), link, until="align")
    assert link.is_symlink()
    assert [path.name for path in link.glob("stages/align/checkpoints/*")] == ["step-0000002"]
    cut(3)
    with pytest.raises(Cut):
        run_recipe(tiny_recipe(), tmp_path / "große Platte 日本" / "run", until="align")
    run_recipe(tiny_recipe(), link, until="align")
    assert link.is_symlink()
    assert same_as_finished(finished, link)


def test_a_clock_that_goes_backwards_changes_nothing(
    finished: Path, tmp_path: Path, cut: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for steps, year in ((2, 2031), (3, 2026), (0, 1999)):
        cut(steps)
        moment = datetime(year, 1, 1, tzinfo=UTC)
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda moment=moment: moment.timestamp() + time.monotonic())
            patch.setattr(provenance, "_now", lambda moment=moment: moment.isoformat(timespec="seconds"))
            try:
                run_recipe(tiny_recipe("engine.checkpoint_every=1"), tmp_path / "run", until="align")
            except Cut:
                assert steps
        # What was written first looks as if it was the last.
        for path in sorted((tmp_path / "run").rglob("*")):
            if path.stat().st_mtime < now + 10**6:
                os.utime(path, (moment.timestamp(), moment.timestamp()))
    checkpoints = tmp_path / "run" / "stages" / "align" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-0000003", "step-0000004"]
    assert same_as_finished(finished, tmp_path / "run")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["underpaint", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.run()
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize("place", ["file", "file/run", "dangling/run"])
def test_no_folder_can_be_made_there(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "nowhere")
    assert call(monkeypatch, "train", str(recipe_file(tmp_path)), "--out", str(tmp_path / place)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Error: The system refused '{tmp_path}")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_read_only_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = os.open

    # The first file that a run makes is its lock. Modes of folders do not stop root, which tests may run as, and a
    # read-only mount needs root: so the answer of the system to either is made here.
    def refuse(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_CREAT and Path(os.fsdecode(path)).parent == tmp_path / "run":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fsdecode(path))
        return real(path, flags, *rest, **options)

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "open", refuse)
    assert call(monkeypatch, "train", str(recipe_file(tmp_path)), "--out", str(tmp_path / "run")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Error: The system refused '{tmp_path / 'run'}")
    assert "Read-only file system" in line
    assert list((tmp_path / "run").iterdir()) == []
