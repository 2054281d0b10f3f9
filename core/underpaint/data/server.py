"""The fork server of reading processes, which lives apart from what signals the processes that it serves.

A terminal, a launcher or a scheduler signals a whole process group. A trainer then saves and ends in its own time, and
the server and the readers that it forks must not be gone before. So the server leaves the group when it imports this
module, the first of those it preloads, and its children are born outside of it. They end when the trainer does, however
it ends.
"""

from __future__ import annotations

import os
import signal
from multiprocessing import forkserver, resource_tracker

__all__ = ["start_server"]

_MARK = "UNDERPAINT_FORK_SERVER"


def start_server(*preloaded: str) -> None:
    """Start this process's fork server, if it has none.

    Args:
        preloaded: Modules that the server imports, so that the processes it forks need not.
    """
    forkserver.set_forkserver_preload([__name__, *preloaded])
    os.environ[_MARK] = "1"
    # Python's own tracker of shared resources stays in the group, and ignores all of these signals but this one.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        resource_tracker.ensure_running()
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        del os.environ[_MARK]


if os.environ.pop(_MARK, None):
    os.setpgid(0, 0)
