"""Runs the cells of a matrix one after the other, each in processes of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import attrs
import psutil

from underpaint.bench.cells import CellRecord, cell_folder, read_record, write_record
from underpaint.bench.matrix import LOADS, Cell
from underpaint.config.recipe import dump_recipe, write_atomically
from underpaint.config.schema import Recipe
from underpaint.errors import ConfigError
from underpaint.training.lock import RunLock
from underpaint.training.signals import StopRequest

__all__ = ["MatrixRun", "run_cells"]

_MEASURE = (sys.executable, "-m", "underpaint.bench.measure")
_MARK = "UNDERPAINT_CELL"
# Seconds in which the system takes a killed process away, unless a device or a disk holds it.
_GONE = 10.0
_TAIL = 30
_READ = 64 * 1024
# How Python, this program and launchers say what went wrong, after what may stand before it in a log of ranks.
_SAID = re.compile(r"(?:\[\w+\]:\s*)?((?:Error: |[\w.]*(?:Error|Exception|Killed)\b:?).*)")


@attrs.frozen(kw_only=True)
class MatrixRun:
    """How a run of a matrix ended.

    Attributes:
        done: Names of cells that are finished, now or before.
        failed: Names of cells that failed now.
        blocked: Names of cells that wait for the tokenizer of a failed one.
        stopped: Name of the signal that ended it; None when every cell had its turn.
    """

    done: tuple[str, ...]
    failed: tuple[str, ...]
    blocked: tuple[str, ...]
    stopped: str | None


def run_cells(cells: Sequence[Cell], out: Path, launcher: Sequence[str], say: Callable[[str], None]) -> MatrixRun:
    """Run the cells that are not finished; one that fails is recorded, and the others go on.

    Args:
        cells: What to run, in this order.
        out: Folder of the matrix; made if it does not exist.
        launcher: What starts a training in place of ``python -m``; empty for that.
        say: Prints a line.

    Raises:
        ConfigError: `out` is a run folder.
        RunLockedError: Another process runs a matrix in `out`.
    """
    if (out / "config.yaml").exists():
        raise ConfigError(f"'{out}' is the folder of a run, and a matrix needs one of its own; choose another --out.")
    (out / "cells").mkdir(parents=True, exist_ok=True)
    done: list[str] = []
    failed: list[str] = []
    blocked: list[str] = []
    with RunLock(out), StopRequest() as stop:
        for number, cell in enumerate(cells, 1):
            place = f"[{number}/{len(cells)}] {cell.name}"
            record = read_record(out, cell)
            if record is not None and record.identity == cell.identity and record.state == "finished":
                say(f"{place}: finished before")
                done.append(cell.name)
                continue
            if cell.loads in failed or cell.loads in blocked:
                say(f"{place}: left out, because it loads the tokenizer of '{cell.loads}'")
                blocked.append(cell.name)
                continue
            say(f"{place}: running, log in '{cell_folder(out, cell) / 'cell.log'}'")
            record = _run_cell(cell, out, launcher, stop)
            took = f"after {record.seconds:.0f} s"
            if record.state == "finished":
                done.append(cell.name)
                say(f"{place}: finished {took}")
            elif record.state == "failed":
                failed.append(cell.name)
                say(f"{place}: failed {took}: {record.reason}")
            else:
                say(f"{place}: interrupted by {stop.requested}; the same command goes on from there")
            if stop.requested:
                break
        return MatrixRun(done=tuple(done), failed=tuple(failed), blocked=tuple(blocked), stopped=stop.requested)


def _run_cell(cell: Cell, out: Path, launcher: Sequence[str], stop: StopRequest) -> CellRecord:
    folder = cell_folder(out, cell)
    folder.mkdir(exist_ok=True)
    before = read_record(out, cell) or CellRecord(identity=cell.identity)
    trained = before.trained and before.identity == cell.identity
    record = CellRecord(identity=cell.identity, trained=trained, seconds=before.seconds, attempts=before.attempts + 1)
    # The record first, so that one that says finished never stands beside another recipe than its own.
    write_record(out, cell, record)
    write_atomically(folder / "config.yaml", dump_recipe(_placed(cell, out)))
    commands = [] if trained else [_train(folder, launcher)]
    commands.append([*_MEASURE, str(folder)])
    start = time.monotonic()
    for command in commands:
        log, code = _call(command, folder / "cell.log", stop)
        record = attrs.evolve(record, seconds=round(before.seconds + time.monotonic() - start, 1))
        if code and stop.requested:
            record = attrs.evolve(record, state="interrupted", reason=f"interrupted by {stop.requested}")
            break
        if code:
            record = attrs.evolve(record, state="failed", reason=_reason(code, log), log=tuple(log[-_TAIL:]))
            break
        record = attrs.evolve(record, trained=True, state="finished" if command is commands[-1] else "interrupted")
        if stop.requested:
            break
    write_record(out, cell, record)
    return record


def _placed(cell: Cell, out: Path) -> Recipe:
    """Return the recipe with the place of the tokenizer that it loads, where that is a cell's."""
    load = cell.recipe.tokenizer.load
    if cell.loads is None or load is None:
        return cell.recipe
    place = (out / "cells" / load.removeprefix(LOADS) / "tokenizer").resolve()
    return attrs.evolve(cell.recipe, tokenizer=attrs.evolve(cell.recipe.tokenizer, load=str(place)))


def _train(folder: Path, launcher: Sequence[str]) -> list[str]:
    start = list(launcher) or [sys.executable, "-m"]
    return [*start, "underpaint", "train", str(folder / "config.yaml"), "--out", str(folder)]


def _call(command: Sequence[str], log: Path, stop: StopRequest) -> tuple[list[str], int]:
    """Run a command in a session of its own; return the lines that it printed, and its exit code."""
    with log.open("ab") as file:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(f"== {now} {' '.join(command)}\n".encode())
        file.flush()
        begin = file.tell()
        mark = uuid.uuid4().hex
        # A session of its own, because Ctrl-C would reach it twice: from the terminal, and from here.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, _MARK: mark},
        )
        try:
            _wait(process, stop)
        finally:
            _end(process, mark)
    with log.open("rb") as read:
        read.seek(max(begin, log.stat().st_size - _READ))
        lines = read.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()], process.returncode


def _wait(process: subprocess.Popen[bytes], stop: StopRequest) -> None:
    told = False
    while process.poll() is None:
        if stop.requested and not told:
            # Whatever was asked for here: it is the one signal that launchers hand on to their ranks and wait for.
            process.terminate()
            told = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """Leave nothing behind that would hold a GPU: ranks and loaders may outlive the process that started them."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # Launchers give each rank a session of its own, and one that has died is no longer known as their parent.
    left = _marked(mark)
    for other in left:
        with contextlib.suppress(psutil.Error):
            other.kill()
    psutil.wait_procs(left, timeout=_GONE)


def _marked(mark: str) -> list[psutil.Process]:
    """Return the processes that were given a mark in their environment."""
    found = []
    for process in psutil.process_iter():
        # What cannot be looked into is of another user, or has just ended.
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == mark:
                found.append(process)
    return found


def _reason(code: int, log: Sequence[str]) -> str:
    """Say in a sentence why a command ended with an exit code other than 0."""
    if code < 0:
        hint = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
        how = f"killed by {signal.Signals(-code).name}{hint}"
    else:
        how = f"exit code {code}"
    said = next((match[1] for line in reversed(log) if (match := _SAID.fullmatch(line.strip()))), None)
    text = said or (log[-1].strip() if log else "")
    return f"{text.removeprefix('Error: ').removesuffix('.')} ({how})" if text else how
