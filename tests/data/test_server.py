"""Reading processes live apart from the process group of the trainer."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import multiprocessing, os, signal
from multiprocessing import forkserver
from underpaint.data.server import start_server

def tell(pipe):
    pipe.send((os.getpid(), os.getppid(), os.getpgid(0), os.environ.get("UNDERPAINT_FORK_SERVER")))

if __name__ == "__main__":
    own, mask = os.getpgid(0), signal.pthread_sigmask(signal.SIG_BLOCK, set())
    start_server("underpaint.data.order")
    start_server("underpaint.data.order")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == mask
    assert "UNDERPAINT_FORK_SERVER" not in os.environ
    assert os.getpgid(0) == own
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("forkserver").Process(target=tell, args=(theirs,))
    process.start()
    pid, server, group, mark = ours.recv()
    process.join()
    assert group == server != own, (group, server, own)
    assert mark is None
    print("apart")
"""


@pytest.mark.slow
def test_server_and_readers_leave_the_group(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("apart\n", "")


def test_importing_it_elsewhere_changes_no_group():
    program = "import os; before = os.getpgid(0); import underpaint.data.server; assert os.getpgid(0) == before"
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=120)
