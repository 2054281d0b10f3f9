"""One writer per run folder."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import engine_cases as cases
import pytest
from processes import on_ranks

from underpaint.errors import RunLockedError
from underpaint.training.lock import RunLock


def test_it_names_the_holder_and_goes_away(tmp_path):
    with RunLock(tmp_path):
        holder = json.loads((tmp_path / "run.lock").read_text())
        assert (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_a_second_live_process_is_refused(tmp_path):
    program = (
        "import sys; from pathlib import Path; from underpaint.training.lock import RunLock\n"
        "with RunLock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(RunLockedError, match=rf"by process {other.pid} on host '{re.escape(socket.gethostname())}'"),
            RunLock(tmp_path),
        ):
            pass
        other.kill()
        other.wait()
        # The killed one could not clean up.
        assert (tmp_path / "run.lock").exists()
        with RunLock(tmp_path):
            assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def write_lock(folder, **fields):
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "start": "1", "since": "2026-01-01T00:00:00+00:00"}
    (folder / "run.lock").write_text(json.dumps(holder | fields))


def test_a_later_process_of_the_same_number_is_not_the_holder(tmp_path):
    write_lock(tmp_path, start="1")
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["start"] != "1"


def test_a_zombie_is_dead(tmp_path):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    assert fields[0] == "Z"
    write_lock(tmp_path, pid=child, start=fields[19])
    with RunLock(tmp_path):
        pass
    os.waitpid(child, 0)


def test_another_host_is_refused_with_what_to_delete(tmp_path):
    write_lock(tmp_path, host="elsewhere", pid=42)
    with (
        pytest.raises(RunLockedError, match=r"process 42 on host 'elsewhere' since 2026.*delete '.*run\.lock'"),
        RunLock(tmp_path),
    ):
        pass
    assert (tmp_path / "run.lock").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "a"}'])
def test_a_damaged_lock_is_refused_with_what_to_delete(tmp_path, content):
    (tmp_path / "run.lock").write_text(content)
    with pytest.raises(RunLockedError, match=r"run\.lock' is damaged.*delete the file"), RunLock(tmp_path):
        pass


def test_a_lock_that_somebody_else_took_over_stays(tmp_path):
    with RunLock(tmp_path):
        write_lock(tmp_path, host="elsewhere")
    assert json.loads((tmp_path / "run.lock").read_text())["host"] == "elsewhere"


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path):
    write_lock(tmp_path, start="1")
    start = threading.Barrier(8)
    results = []

    def take() -> None:
        start.wait()
        try:
            RunLock(tmp_path).__enter__()
            results.append("got")
        except RunLockedError:
            results.append("refused")

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["got"] + ["refused"] * 7


@pytest.mark.slow
def test_all_ranks_are_refused_together(tmp_path):
    (tmp_path / "run").mkdir()
    main, other = on_ranks(tmp_path / "out", 2, cases.locked, str(tmp_path / "run"))
    assert main == other
    assert "is in use by process" in main
    assert list((tmp_path / "run").iterdir()) == []
