"""Processes that tests start, and that do not outlive them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from underpaint.training.ranks import Ranks


def free_port() -> int:
    # Not one that the system chooses: it may give the same to a socket of another test before the ranks have taken it.
    for port in random.SystemRandom().sample(range(20000, 30000), 100):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("There is no free port.")


def be_rank(rank: int, world_size: int, port: int) -> None:
    """Make this process a rank, as a launcher does."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _enter(rank: int, world_size: int, port: int, out: str, case: Callable[..., Any], args: tuple[Any, ...]) -> None:
    be_rank(rank, world_size, port)
    with Ranks("cpu", timeout=60) as ranks:
        result = case(ranks, *args)
    torch.save(result, f"{out}/{rank}.pt")


def on_ranks(folder: Path, world_size: int, case: Callable[..., Any], *args: Any) -> list[Any]:
    """Run ``case(ranks, *args)``, a function of a module, on so many processes and return what it gives on each."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.start_processes(
        _enter, args=(world_size, free_port(), str(folder), case, args), nprocs=world_size, start_method="spawn"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def report_of(script: str, *arguments: str, timeout: float = 300) -> Any:
    """Run a script of this folder, which starts processes itself, and return the JSON of its last line."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, error = process.communicate(timeout=timeout)
        assert process.returncode == 0, error[-3000:]
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
        return json.loads(output.splitlines()[-1])
    finally:
        if process.poll() is None:
            # Those it has started are of its session, and would train for ever.
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
