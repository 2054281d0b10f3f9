"""Kill a training loop that saves after every step, again and again, and see from where the next one goes on.

Run as a script: ``python kill_trials.py FOLDER TRIALS``. The children are forked, so that torch is imported once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import engine_cases as cases
import torch

from underpaint.training.checkpoint import CheckpointStore
from underpaint.training.ranks import Ranks


def run(folder: Path, until: int, report: int | None) -> None:
    """Go on from the newest checkpoint; say what it was, then each step that is saved."""
    with Ranks("cpu") as ranks:
        store = CheckpointStore(folder, 2, ranks)
        engine = cases.make_engine(ranks)
        latest = store.latest(verify=True)
        if latest is not None:
            engine.load(latest.folder)
            assert engine.train_state == latest.step
        say(report, "resumed", engine.train_state)
        for step in range(engine.train_state, until):
            cases.train(engine, step, step + 1)
            made = store.save(step + 1, engine.save, {})
            assert made is not None
            say(report, "saved", made.step)
        if report is None:
            torch.save(engine.state("raw"), folder.with_suffix(".pt"))
        engine.close()


def say(report: int | None, what: str, step: int) -> None:
    if report is not None:
        os.write(report, f"{what} {step}\n".encode())


def trial(folder: Path, seconds: float) -> tuple[int, int]:
    """Let a child train until it is killed.

    Returns:
        The steps that it resumed from and that it last said to be saved.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run(folder, 10**9, write)
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as lines:
        first = lines.readline()
        assert first.startswith("resumed"), first
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        rest = lines.readlines()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), status
    resumed = int(first.split()[1])
    return resumed, int(rest[-1].split()[1]) if rest else resumed


def main() -> None:
    torch.set_num_threads(1)
    base, trials = Path(sys.argv[1]), int(sys.argv[2])
    generator = random.Random(0)
    with Ranks("cpu") as ranks:
        cases.make_engine(ranks).close()
    folder = base / "killed"
    pairs = []
    interrupted = 0
    _, reported = trial(folder, 0.5)
    for _ in range(trials):
        interrupted += any(".tmp-" in path.name for path in folder.iterdir())
        resumed, saved = trial(folder, generator.uniform(0.0, 0.3))
        pairs.append((reported, resumed))
        reported = saved
    last = reported + 2
    run(folder, last, None)
    run(base / "straight", last, None)
    first, second = (torch.load(base / f"{name}.pt") for name in ("killed", "straight"))
    difference = max(float((first[name].double() - second[name].double()).abs().max()) for name in first)
    print(json.dumps({"trials": pairs, "steps": last, "difference": difference, "interrupted": interrupted}))


if __name__ == "__main__":
    main()
