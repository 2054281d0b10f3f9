"""Ranks that wait for one that has died, stopped or is slow."""

from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from processes import report_of

from underpaint.errors import UnderpaintError
from underpaint.training import watchdog as module
from underpaint.training.watchdog import Watchdog


class Store:
    """What the ranks say, as the store of the process group keeps it."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.gone = False

    def set(self, key: str, value: str) -> None:
        if self.gone:
            raise RuntimeError("Broken pipe")
        self.values[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.values[key] for key in keys]


def ranks(rank: int, world_size: int, store: Store) -> Any:
    return SimpleNamespace(rank=rank, world_size=world_size, is_main=rank == 0, store=lambda: store)


class Others:
    """The other ranks, beating from a thread: rank → (step, what it does)."""

    def __init__(
        self,
        store: Store,
        places: dict[int, tuple[int, str]],
        silent: tuple[int, ...] = (),
        leaves: tuple[int, ...] = (),
    ) -> None:
        self._store, self._places, self._silent, self._leaves = store, places, silent, leaves
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        beats = 0
        while not self._done.wait(0.002) and not self._store.gone:
            beats += 1
            for rank, place in self._places.items():
                if rank not in self._silent or beats == 1:
                    self._store.set(f"underpaint/s/{rank}", json.dumps([beats, *place, rank in self._leaves]))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


@pytest.mark.parametrize(
    ("places", "silent", "said"),
    [
        ({1: (7, "computes"), 2: (7, "computes")}, (2,), ": rank 2 does not answer. Look"),
        ({1: (7, "computes"), 2: (7, "reads")}, (), ": rank 2 answers, but still reads step 7. Look"),
        ({1: (6, "saves"), 2: (6, "saves")}, (), ": rank 1 answers, but still saves step 6, rank 2 answers, but"),
        ({1: (7, "computes"), 2: (7, "computes")}, (), ": all ranks answer, and are at the same place. Look"),
        (dict.fromkeys(range(1, 12), (7, "computes")), tuple(range(1, 12)), "rank 8 does not answer, and 3 more."),
    ],
)
def test_it_names_who_keeps_the_others_waiting(places, silent, said, monkeypatch, capsys):
    store, codes = Store(), []
    ended = threading.Event()

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(module.os, "_exit", leave)
    with Others(store, places, silent), Watchdog(ranks(0, len(places) + 1, store), "s", 0.5) as watchdog:
        watchdog.at(7, "computes")
        assert ended.wait(30)
        watchdog.at(8, "reads")
    assert set(codes) == {2}
    error = capsys.readouterr().err
    assert "Error: Rank 0 of" in error
    assert "longer than engine.timeout, where stage 's' computes step 7" in error
    assert said in error


def test_a_lost_connection_is_a_sentence():
    store = Store()
    gloo = "[/src/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:1: Connection reset by peer. Long advice"
    silent = Others(store, {1: (3, "reads"), 2: (3, "reads")}, (1,))
    with (
        silent,
        pytest.raises(UnderpaintError, match=r"lost the connection \(Read error .* by peer\).*: rank 1 does not"),
        Watchdog(ranks(0, 3, store), "s", 0.5),
    ):
        raise RuntimeError(gloo)


def test_it_looks_for_who_has_gone_longer_than_it_would_wait(monkeypatch, capsys):
    store, codes = Store(), []
    monkeypatch.setattr(module.os, "_exit", codes.append)
    with (
        Others(store, {1: (3, "reads"), 2: (3, "reads")}, (1,)),
        pytest.raises(UnderpaintError, match="lost the connection"),
        Watchdog(ranks(0, 3, store), "s", 4.0),
    ):
        time.sleep(3.0)
        raise RuntimeError("gloo: closed")
    assert not codes
    assert capsys.readouterr().err == ""


def test_the_store_goes_with_its_rank():
    store = Store()
    with (
        Others(store, dict.fromkeys((0, 1, 3), (3, "saves")), silent=(1,), leaves=(0,)),
        pytest.raises(UnderpaintError, match="saves step 3: rank 1 does not answer. Look"),
        Watchdog(ranks(2, 4, store), "s", 6.0) as watchdog,
    ):
        watchdog.at(3, "saves")
        time.sleep(2.7)
        store.gone = True
        time.sleep(2.1)
        raise RuntimeError("gloo: closed")


def test_other_errors_pass():
    store = Store()
    with (
        Others(store, {1: (1, "reads")}),
        pytest.raises(RuntimeError, match="a mistake"),
        Watchdog(ranks(0, 2, store), "s", 0.5),
    ):
        raise RuntimeError("a mistake")


def test_it_waits_as_long_as_steps_come(capsys):
    store = Store()
    with Others(store, {1: (1, "reads")}), Watchdog(ranks(0, 2, store), "s", 0.5) as watchdog:
        for step in range(20):
            watchdog.at(step, "computes")
            time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_a_world_of_one_has_no_watchdog():
    with Watchdog(SimpleNamespace(rank=0, world_size=1, is_main=True), "s", 0.01):
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("watchdog")]
        time.sleep(0.1)


@pytest.mark.slow
def test_a_rank_killed_while_zero_saves(tmp_path):
    trials = report_of("rank_trials.py", str(tmp_path), "kill")
    reported = 0
    for one in trials:
        assert reported <= one["resumed"] <= reported + 1
        reported = one["saved"]
        assert one["codes"] == [2] * 3
        assert one["seconds"] < 60
        for error in one["errors"]:
            assert "lost the connection" in error
            assert f": rank {one['victim']}" in error
            assert error.count("does not answer") == 1
    assert any(one["temporary"] for one in trials)


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_reported_with_the_step(tmp_path):
    for one in report_of("rank_trials.py", str(tmp_path), "stop"):
        (error,) = one["errors"]
        assert one["codes"] == [2]
        assert f"step {one['saved'] + 1}: rank {one['victim']}" in error
        assert "does not answer" in error
        assert one["seconds"] < 60
