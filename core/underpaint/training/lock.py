"""One writer per run folder."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import attrs

from underpaint.errors import RunLockedError

if TYPE_CHECKING:
    from underpaint.training.ranks import Ranks

__all__ = ["RunLock"]

_NAME = "run.lock"


@attrs.frozen
class _Holder:
    """The process that a lock names.

    Attributes:
        host: Name of its machine.
        pid: Its number there.
        start: When the machine started it, in the machine's own terms; tells it from a later process of that number.
        since: When it took the lock, for people.
    """

    host: str
    pid: int
    start: str
    since: str


def _start_of(pid: int) -> str | None:
    """Return when a process of this machine started; an empty string where that is not known, None when it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        fields = []
    if fields:
        state, start = fields[0], fields[19]
        return None if state in "ZX" else start
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return ""
    return ""


def _read(path: Path) -> _Holder | None:
    """Return the holder, or None when the file does not say."""
    try:
        fields = json.loads(path.read_text())
        return _Holder(str(fields["host"]), int(fields["pid"]), str(fields["start"]), str(fields["since"]))
    except (ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Serialise the takers of this machine, so that of two that find a stale lock one gets it.

    Without it the second could remove the lock that the first has just made.
    """
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems have no such locks; exclusive creation still holds there.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class RunLock:
    """Context that holds ``run.lock`` in a run folder.

    Args:
        folder: Existing run folder.
        ranks: The processes of the run: rank 0 takes the lock for all, and all fail together. None for a process
            on its own.

    Raises:
        RunLockedError: Another live process holds the lock, or one of which this machine cannot know that.
    """

    def __init__(self, folder: Path, ranks: Ranks | None = None) -> None:
        self._folder = folder
        self._path = folder / _NAME
        self._ranks = ranks
        self._mine: _Holder | None = None

    def __enter__(self) -> RunLock:
        problem: str | None = None
        if self._ranks is None or self._ranks.is_main:
            with _alone(self._folder):
                problem = self._take()
        if self._ranks is not None:
            problem = self._ranks.broadcast_object(problem)
        if problem is not None:
            raise RunLockedError(problem)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mine is None:
            return
        with _alone(self._folder), contextlib.suppress(FileNotFoundError):
            # Whoever deleted the lock by hand may have let another run in.
            if _read(self._path) == self._mine:
                self._path.unlink()
        self._mine = None

    def _take(self) -> str | None:
        """Take the lock, or say why not."""
        if self._path.exists():
            problem = self._refusal(_read(self._path))
            if problem is not None:
                return problem
            self._path.unlink()
        now = dt.datetime.now().astimezone().isoformat(timespec="seconds")
        mine = _Holder(socket.gethostname(), os.getpid(), _start_of(os.getpid()) or "", now)
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return (
                self._refusal(_read(self._path)) or f"'{self._folder}' was taken by another run just now; start again."
            )
        with os.fdopen(descriptor, "w") as file:
            json.dump(attrs.asdict(mine), file)
            file.flush()
            os.fsync(file.fileno())
        self._mine = mine
        return None

    def _refusal(self, holder: _Holder | None) -> str | None:
        """Say why the lock cannot be taken from its holder; None when it can."""
        if holder is None:
            return (
                f"'{self._path}' is damaged, so the run that holds '{self._folder}' is unknown; "
                "delete the file if none is active."
            )
        if holder.host != socket.gethostname():
            return (
                f"'{self._folder}' is in use by process {holder.pid} on host '{holder.host}' since {holder.since}; "
                f"if that run is dead, delete '{self._path}'."
            )
        start = _start_of(holder.pid)
        if start is None or start != holder.start:
            return None
        return (
            f"'{self._folder}' is in use by process {holder.pid} on host '{holder.host}' since {holder.since}; "
            "wait for it, stop it, or choose another folder."
        )
