"""Kill or stop one of several ranks, again and again, and see how the others end and from where all go on.

Run as a script: ``python rank_trials.py FOLDER kill|stop``. The ranks are forked, so that torch is imported once.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import engine_cases as cases
import torch
from processes import free_port
from torch import Tensor

from underpaint.config.engine import EngineConfig
from underpaint.errors import UnderpaintError
from underpaint.training.checkpoint import CheckpointStore
from underpaint.training.engine import StepResult
from underpaint.training.loop import train_loop
from underpaint.training.ranks import Ranks
from underpaint.training.signals import StopRequest
from underpaint.training.watchdog import Watchdog

# One that is no neighbour of a rank that was killed loses its connection only when a neighbour has reported and left.
TIMEOUT = {"kill": 30.0, "stop": 6.0}
PATIENCE = 60.0


def train(folder: Path, report: int, timeout: float) -> None:
    """Go on from the newest checkpoint, saving after every step; say what it was, then each step that is saved."""

    def say(what: str, step: int) -> None:
        os.write(report, f"{what} {step}\n".encode())

    def step_fn(batch: int, step: int, micro: int) -> tuple[Mapping[str, Tensor], StepResult]:
        x, y = (part[ranks.rank :: ranks.world_size] for part in cases.batch(step))
        loss = cases.loss_of(engine(x), y)
        engine.backward(loss)
        return {"loss": loss}, engine.step()

    def call(hook: str, **facts: Any) -> None:
        if hook == "on_checkpoint_saved" and ranks.is_main:
            say("saved", facts["step"])

    with Ranks("cpu", timeout=timeout + PATIENCE) as ranks:
        store = CheckpointStore(folder, 2, ranks)
        engine = cases.make_engine(ranks, zero=2)
        latest = store.latest(verify=True)
        if latest is not None:
            engine.load(latest.folder)
            assert engine.train_state == latest.step
        if ranks.is_main:
            say("resumed", engine.train_state)
        with StopRequest() as stop, Watchdog(ranks, "one", timeout) as watchdog:
            train_loop(
                name="one",
                batches=itertools.count(),
                step_fn=step_fn,
                start=engine.train_state,
                steps=10**9,
                images_per_step=cases.BATCH,
                flops_per_image=1.0,
                peak=1.0,
                config=EngineConfig(checkpoint_every=1),
                save=engine.save,
                store=store,
                log=None,
                ranks=ranks,
                stop=stop,
                watchdog=watchdog,
                enough=lambda step: False,
                call=call,
            )


def start(folder: Path, rank: int, world_size: int, port: int, report: int, timeout: float) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        errors = os.open(folder.with_name(f"errors-{rank}"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        os.dup2(errors, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        train(folder, report, timeout)
    except UnderpaintError as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        code = 2
    finally:
        os._exit(code)


def wait(children: Mapping[int, int], patience: float) -> dict[int, int]:
    """Wait for children by rank, kill those that do not end, and return how each ended, as a shell counts."""
    ended: dict[int, int] = {}
    deadline = time.monotonic() + patience
    for rank, child in children.items():
        while rank not in ended:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                ended[rank] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
    return ended


@attrs.frozen
class Trial:
    """What came of one.

    Attributes:
        victim: Rank that was hurt.
        resumed: Step that the ranks went on from.
        saved: Last step that rank 0 reported as saved.
        codes: How the others ended.
        seconds: How long that took.
        errors: Last line that each of the others wrote.
        temporary: Whether a checkpoint was being written at that moment.
    """

    victim: int
    resumed: int
    saved: int
    codes: list[int]
    seconds: float
    errors: list[str]
    temporary: bool


def trial(folder: Path, world_size: int, victim: int, what: signal.Signals, seconds: float, timeout: float) -> Trial:
    port = free_port()
    read, write = os.pipe()
    children = {rank: start(folder, rank, world_size, port, write, timeout) for rank in range(world_size)}
    os.close(write)
    with os.fdopen(read) as lines:
        first, second = lines.readline(), lines.readline()
        assert first.startswith("resumed"), first
        time.sleep(seconds)
        os.kill(children[victim], what)
        began = time.monotonic()
        temporary = any(".tmp-" in path.name for path in folder.iterdir())
        others = {rank: child for rank, child in children.items() if rank != victim}
        codes = wait(others, PATIENCE)
        took = time.monotonic() - began
        os.kill(children[victim], signal.SIGKILL)
        os.waitpid(children[victim], 0)
        rest = [second, *lines.readlines()]
    errors = [
        [line for line in folder.with_name(f"errors-{rank}").read_text().splitlines() if line.startswith("Error")]
        for rank in others
    ]
    return Trial(
        victim=victim,
        resumed=int(first.split()[1]),
        saved=int(rest[-1].split()[1]),
        codes=list(codes.values()),
        seconds=took,
        errors=[found[-1] if found else "" for found in errors],
        temporary=temporary,
    )


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) / "killed"
    generator = random.Random(0)
    # What the engine imports, once for all.
    with Ranks("cpu") as ranks:
        cases.make_engine(ranks, zero=2).close()
    if sys.argv[2] == "kill":
        victims, world_size, what = [1, 0, 3, 2], 4, signal.SIGKILL
    else:
        victims, world_size, what = [1, 0], 2, signal.SIGSTOP
    timeout = TIMEOUT[sys.argv[2]]
    trials = [trial(folder, world_size, victim, what, generator.uniform(0.0, 0.3), timeout) for victim in victims]
    print(json.dumps([attrs.asdict(one) for one in trials]))


if __name__ == "__main__":
    main()
