"""Whole runs in processes of their own: several ranks, kills, signals, two writers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import underpaint
from tests.run.conftest import finish, recipe_file, train
from underpaint.training.log import read_rows
from underpaint.weights import tensor_hash

pytestmark = pytest.mark.slow


def losses(out: Path, stage: str) -> list[float]:
    return [row["loss"] for row in read_rows(out / "stages" / stage / "metrics.jsonl")]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_two_ranks_give_the_losses_of_one(zero: int, finished: Path, tmp_path: Path) -> None:
    # Stage 2 trains everything and has a teacher. Sums over ranks are rounded in another order, hence 1e-4.
    process = train(recipe_file(tmp_path), tmp_path / "run", f"engine.zero={zero}", ranks=2, until="perceive")
    error = finish(process)
    assert process.returncode == 0, error
    for stage in ("align", "perceive"):
        np.testing.assert_allclose(losses(tmp_path / "run", stage), losses(finished, stage), rtol=1e-4)


def test_diffusion_on_two_ranks_gives_the_losses_of_one(finished: Path, tmp_path: Path) -> None:
    process = train(recipe_file(tmp_path), tmp_path / "run", "engine.zero=1", ranks=2, until="diffusion")
    error = finish(process)
    assert process.returncode == 0, error
    # Latents are stored in bfloat16, where a last-bit difference of the tokenizer may be a step of 0.4 %.
    np.testing.assert_allclose(losses(tmp_path / "run", "diffusion"), losses(finished, "diffusion"), rtol=2e-3)


def test_killed_at_any_moment_it_goes_on_to_the_same_result(tmp_path: Path) -> None:
    recipe, long = recipe_file(tmp_path), ["stages.align.steps=120", "engine.checkpoint_every=1"]
    whole = train(recipe, tmp_path / "whole", *long)
    error = finish(whole)
    assert whole.returncode == 0, error
    rng = np.random.default_rng(0)
    killed = 0
    for _ in range(20):
        process = train(recipe, tmp_path / "run", *long)
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("align "):
                break
        time.sleep(float(rng.uniform(0.0, 0.5)))
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed
    last = train(recipe, tmp_path / "run", *long)
    error = finish(last)
    assert last.returncode == 0, error
    states = [
        underpaint.load(tmp_path / name / "stages" / "align" / "tokenizer").state_dict() for name in ("whole", "run")
    ]
    assert tensor_hash(states[0]) == tensor_hash(states[1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(number: signal.Signals, code: int, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path)
    process = train(recipe, tmp_path / "run", "stages.align.steps=5000", "engine.checkpoint_every=5000")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("align 5/"):
            break
    process.send_signal(number)
    error = finish(process)
    assert process.returncode == code, error
    assert "Run the same command to go on" in error
    assert "Traceback" not in error
    (made,) = (tmp_path / "run" / "stages" / "align" / "checkpoints").glob("step-*/manifest.json")
    saved = int(made.parent.name.removeprefix("step-"))
    if number == signal.SIGUSR1:
        again = train(recipe, tmp_path / "run", "stages.align.steps=5000", "engine.checkpoint_every=5000")
        assert again.stderr is not None
        first = next(line for line in again.stderr if line.startswith("align "))
        assert first.startswith(f"align {saved + 1}/")


LONG = ["stages.align.steps=50000", "engine.checkpoint_every=50000"]


def saved_step(out: Path) -> int:
    (made,) = (out / "stages" / "align" / "checkpoints").glob("step-*/manifest.json")
    return int(made.parent.name.removeprefix("step-"))


def first_step(process: subprocess.Popen[str]) -> int:
    assert process.stderr is not None
    line = next(line for line in process.stderr if line.startswith("align "))
    return int(line.split()[1].split("/")[0])


def group_is_gone(group: int) -> bool:
    """Whether no process of a session is left but those that only wait to be counted."""
    left = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            left += [stat] if int(session) == group and state != "Z" else []
    return not left


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_saves_too_where_others_read_the_images(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    # As a terminal sends Ctrl-C, and launchers and schedulers their signals: to the readers as well.
    recipe, out = recipe_file(tmp_path), tmp_path / "run"
    process = train(recipe, out, *LONG, "data.workers=2")
    assert first_step(process) == 1
    os.killpg(process.pid, number)
    error = finish(process)
    assert process.returncode == code, error
    assert "Run the same command to go on" in error
    assert "Traceback" not in error
    again = train(recipe, out, *LONG, "data.workers=2")
    assert first_step(again) == saved_step(out) + 1
    again.kill()
    again.communicate()
    end = time.monotonic() + 60
    while not group_is_gone(process.pid) or not group_is_gone(again.pid):
        assert time.monotonic() < end, "processes that read images live on"
        time.sleep(0.1)


def test_ranks_that_a_launcher_ends_save_where_others_read_the_images(tmp_path: Path) -> None:
    # torchrun sends SIGTERM to the groups of its ranks.
    recipe, out = recipe_file(tmp_path), tmp_path / "run"
    process = train(recipe, out, *LONG, "data.workers=2", ranks=2)
    assert first_step(process) == 1
    process.terminate()
    error = finish(process)
    assert "Run the same command to go on" in error
    assert "process that reads images" not in error
    saved = saved_step(out)
    again = train(recipe, out, *LONG, "data.workers=2", ranks=2)
    assert first_step(again) == saved + 1
    again.terminate()
    finish(again)


# The command, on a disk that takes for ever once half of a file is written. The folder it writes to is in SLOW.
SLOW_DISK = """
import os, time
from pathlib import Path
import underpaint.training.state as state
from underpaint.cli.main import run

def write(tensors, path, metadata):
    path.write_bytes(b"half of a file")
    Path(os.environ["SLOW"]).touch()
    time.sleep(600)

state.save_tensors = write
run()
"""


def test_a_second_signal_does_not_wait_for_the_checkpoint(tmp_path: Path) -> None:
    recipe, long = recipe_file(tmp_path), ["stages.align.steps=5000", "engine.checkpoint_every=5000"]
    saving, checkpoints = tmp_path / "saving", tmp_path / "run" / "stages" / "align" / "checkpoints"

    def until_step(process: subprocess.Popen[str]) -> int:
        """Wait for a few steps; return the first."""
        assert process.stderr is not None
        steps = (int(line.split()[1].split("/")[0]) for line in process.stderr if line.startswith("align "))
        first = next(steps)
        next(step for step in steps if step >= first + 3)
        return first

    first = train(recipe, tmp_path / "run", *long)
    assert until_step(first) == 1
    first.terminate()
    finish(first)
    (made,) = checkpoints.iterdir()
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    saved = int(made.name.removeprefix("step-"))

    second = train(recipe, tmp_path / "run", *long, program=["-c", SLOW_DISK], SLOW=str(saving))
    assert until_step(second) == saved + 1
    second.terminate()
    while not saving.exists():
        assert second.poll() is None
        time.sleep(0.01)
    second.terminate()
    error = finish(second)
    assert second.returncode == 143, error
    assert error.splitlines()[-1].startswith("Error: Interrupted. What was committed before is intact")
    assert "Traceback" not in error
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before
    assert [path.name for path in checkpoints.iterdir() if ".tmp-" not in path.name] == [made.name]
    assert [path.name for path in checkpoints.rglob("*.safetensors") if path.stat().st_size == 14]

    third = train(recipe, tmp_path / "run", *long)
    assert until_step(third) == saved + 1
    third.kill()
    third.communicate()


def test_a_second_process_on_the_folder_is_refused(tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path)
    first = train(recipe, tmp_path / "run", "stages.align.steps=5000")
    assert first.stderr is not None
    for line in first.stderr:
        if line.startswith("align 2/"):
            break
    second = train(recipe, tmp_path / "run", "stages.align.steps=5000")
    error = finish(second)
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert str(first.pid) in error
    assert "Traceback" not in error
