"""The processes of a run: who this one is, where it computes, and how it talks to the others."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, TypeVar

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from underpaint.errors import ConfigError, UnderpaintError

__all__ = ["Ranks", "lost_connection"]

_T = TypeVar("_T")

# Seconds that are thousands of times what a thread needs, on a machine where it must wait for its turn too.
_LETS_GO = 0.5


@attrs.frozen
class _Place:
    """Where a launcher put this process."""

    rank: int
    world_size: int
    local_rank: int
    launched: bool


def _number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environ.get(name, default)
    if text is None or not text.isdigit():
        found = "missing" if text is None else f"'{text}'"
        raise ConfigError(
            f"The environment variable {name} is {found}, but the launcher has to set it to a number; start with "
            "torchrun, the deepspeed launcher or srun, or unset RANK to run a single process."
        )
    return int(text)


def _first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list such as ``gpu[03-05,9],login1``."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    assert match is not None, nodes
    prefix, number, suffix = match.groups()
    return f"{prefix}{number or ''}{suffix or ''}"


def _place(environ: Mapping[str, str]) -> tuple[_Place, dict[str, str]]:
    """Read the launcher's variables.

    Returns:
        The place, and the variables that torch and DeepSpeed expect beyond those that are set.
    """
    if "RANK" in environ:
        place = _Place(
            _number(environ, "RANK"), _number(environ, "WORLD_SIZE"), _number(environ, "LOCAL_RANK", "0"), True
        )
        add = {"LOCAL_RANK": str(place.local_rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    elif "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        # SLURM_NTASKS is also set in a batch script that starts no tasks; the step's count is set by srun alone.
        place = _Place(
            _number(environ, "SLURM_PROCID"),
            _number(environ, "SLURM_STEP_NUM_TASKS"),
            _number(environ, "SLURM_LOCALID"),
            True,
        )
        nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
        add = {
            "RANK": str(place.rank),
            "WORLD_SIZE": str(place.world_size),
            "LOCAL_RANK": str(place.local_rank),
            "MASTER_ADDR": _first_host(nodes),
            # Jobs that share a node need ports of their own, and all tasks of a job the same one.
            "MASTER_PORT": str(20000 + _number(environ, "SLURM_JOB_ID", "0") % 20000),
        }
    else:
        place = _Place(0, 1, 0, False)
        add = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    if place.rank >= place.world_size:
        raise ConfigError(
            f"The launcher says rank {place.rank} of {place.world_size} processes; check RANK and WORLD_SIZE."
        )
    return place, {name: value for name, value in add.items() if name not in environ}


def _pick_device(asked: Literal["auto", "cpu", "cuda"], local_rank: int) -> torch.device:
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"engine.device is 'cuda', but torch {torch.__version__} sees no GPU here; use 'auto' or 'cpu', "
            "or install a CUDA build of torch."
        )
    # A launcher may show each process only its own GPU.
    count = torch.cuda.device_count()
    if count == 1:
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise ConfigError(
            f"Local rank {local_rank} needs a GPU of its own, but there are {count}; start {count} processes per node."
        )
    return torch.device("cuda", local_rank)


class Ranks:
    """Context of the processes that train together.

    Understands torchrun, the DeepSpeed launcher (``RANK``, ``WORLD_SIZE``, …) and srun (``SLURM_*``).
    A plain process needs no environment and is a world of one.

    Args:
        device: ``auto`` takes the GPU of this local rank when there is one.
        timeout: Seconds after which a collective that a rank does not join fails.

    Attributes:
        rank: 0 to world_size − 1.
        world_size: Number of processes.
        local_rank: Rank on this machine.
        device: Where this rank computes.
        is_main: Whether this is rank 0.

    Raises:
        ConfigError: The device does not exist or the launcher's variables are incomplete.
        UnderpaintError: On leaving: another rank has gone.
    """

    def __init__(self, device: Literal["auto", "cpu", "cuda"] = "auto", *, timeout: float = 1800.0) -> None:
        place, self._add = _place(os.environ)
        self.rank = place.rank
        self.world_size = place.world_size
        self.local_rank = place.local_rank
        self.device = _pick_device(device, place.local_rank)
        self.is_main = place.rank == 0
        self._launched = place.launched
        self._timeout = timedelta(seconds=timeout)
        self._objects: Any = None
        self._before: dict[str, str | None] = {}

    def __enter__(self) -> Ranks:
        if dist.is_initialized():
            raise UnderpaintError("torch.distributed is already initialised in this process; leave that to Ranks.")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            # DeepSpeed takes the GPU of this number, which differs where each process sees only one.
            self._add["LOCAL_RANK"] = str(self.device.index)
        else:
            self._add["DS_ACCELERATOR"] = "cpu"
        self._before = {name: os.environ.get(name) for name in self._add}
        os.environ.update(self._add)
        deepspeed = self._import_deepspeed()
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if not self._launched:
            # DeepSpeed would meet a lone process through a file, which stays behind where that process is killed.
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=self._timeout)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=self._timeout)
        # Objects are pickled into CPU tensors: NCCL would carry them through the GPU and wait for its stream.
        self._objects = dist.new_group(backend="gloo") if self.device.type == "cuda" else dist.group.WORLD
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error on one rank the others may hang in a collective, and NCCL would wait for them here.
        if dist.is_initialized() and (kind is None or self.world_size == 1 or self.device.type == "cpu"):
            self._import_deepspeed().comm.destroy_process_group()
            if self.world_size > 1:
                # DeepSpeed holds the groups until the process ends, so that nothing joins Gloo's threads. One that has
                # yet to let go of the last operation's tensors needs the interpreter for it: once that has ended, the
                # thread cannot have it and ends the process with SIGABRT.
                time.sleep(_LETS_GO)
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._objects = None
        lost = lost_connection(error) if self.world_size > 1 else None
        if lost is not None:
            raise UnderpaintError(
                f"Rank {self.rank} of {self.world_size} lost the connection to another ({lost}); look for what the "
                "rank that ended first wrote."
            ) from error

    def _import_deepspeed(self) -> Any:
        import deepspeed
        from deepspeed.accelerator import get_accelerator
        from deepspeed.utils import logging as deepspeed_logging

        deepspeed_logging.set_log_level_from_string("warning")
        # Its handler writes to standard output, which belongs to what a command prints, JSON among it. Without one
        # the warnings go the way of all others.
        for handler in list(deepspeed_logging.logger.handlers):
            deepspeed_logging.logger.removeHandler(handler)
        deepspeed_logging.logger.propagate = True
        # Newer versions of torch say so at every single collective of DeepSpeed, which has to support older ones.
        warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
        chosen = str(get_accelerator().device_name())
        if chosen != self.device.type:
            raise UnderpaintError(
                f"DeepSpeed was set up for '{chosen}' in this process and cannot change to '{self.device.type}'; "
                "start a new process, or unset DS_ACCELERATOR."
            )
        if self.device.type == "cpu":
            # Without an answer here DeepSpeed probes every C++ op and compiles one for shared-memory
            # inference, a minute of compiler time for nothing that training uses.
            vars(deepspeed.ops).setdefault("__compatible_ops__", {})
        return deepspeed

    def store(self) -> Any:
        """Return a connection of its own to the key-value store through which the ranks found each other."""
        # The process group holds its own connection for as long as an operation of it waits.
        return dist.distributed_c10d._get_default_store().clone()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier(group=self._objects)

    def broadcast_object(self, value: _T) -> _T:
        """Return rank 0's picklable `value` on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._objects)
        return box[0]

    def all_gather_object(self, value: _T) -> list[_T]:
        """Return the picklable `value` of every rank, in the order of the ranks."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._objects)
        return values

    def any_true(self, value: bool) -> bool:
        """Whether `value` is true on any rank; the same answer everywhere."""
        flag = torch.tensor([int(value)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._objects)
        return bool(flag.item())

    def average(self, tensor: Tensor) -> Tensor:
        """Return the mean of `tensor` over the ranks."""
        if self.world_size == 1:
            return tensor
        return self.all_reduce_sum(tensor.clone()) / self.world_size

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Add up `tensor` over the ranks, in place, and return it; CPU and GPU tensors both work."""
        group = self._objects if tensor.device.type == "cpu" else dist.group.WORLD
        dist.all_reduce(tensor, group=group)
        return tensor


def lost_connection(error: BaseException | None) -> str | None:
    """Return what an error says of a lost connection between ranks; None if it is of something else."""
    # Gloo raises a plain RuntimeError, whose text begins with the file of its source that found out.
    if not (isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))):
        return None
    line = str(error).splitlines()[0]
    return line.partition("] ")[2].split(". ")[0] or line
