"""Notices that a rank has stopped or has gone, and says which one and where, instead of waiting for ever."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from types import TracebackType
from typing import Any

from underpaint.errors import UnderpaintError
from underpaint.training.ranks import Ranks, lost_connection

__all__ = ["Watchdog"]

_BEAT = 2.0
_MISSED = 3
_NAMED = 8
# What a rank does in a step, in this order.
_PLACES = ("reads", "computes", "measures", "saves")


class Watchdog:
    """Context of a training loop whose ranks wait for each other.

    Every rank tells the others, through the store of the launcher, that it is alive, in which step it is and what it
    does there. A rank that has not come further for `timeout` seconds reports who keeps it waiting and ends its
    process with exit code 2: whatever it waits in cannot be interrupted, and the last checkpoint is whole. A lost
    connection becomes an `UnderpaintError` that says the same. A world of one has nobody to wait for.

    Args:
        ranks: The processes; entered.
        stage: Name of the stage.
        timeout: Seconds.

    Raises:
        UnderpaintError: On leaving: another rank has gone.
    """

    def __init__(self, ranks: Ranks, stage: str, timeout: float) -> None:
        self._ranks = ranks
        self._stage = stage
        self._timeout = timeout
        self._beat = min(_BEAT, timeout / 10)
        self._now = (1, "reads")
        self._since = time.monotonic()
        self._leaves = False
        self._heard: dict[int, tuple[str, float]] = {}
        self._rounds = 0
        self._left = threading.Event()
        self._done = threading.Event()
        self._threads: list[threading.Thread] = []

    def at(self, step: int, does: str) -> None:
        """Note how far this rank has come.

        Args:
            step: Optimizer step, from 1 on.
            does: ``reads``, ``computes``, ``measures`` or ``saves``, in this order.
        """
        self._now = (step, does)
        self._since = time.monotonic()

    def __enter__(self) -> Watchdog:
        if self._ranks.world_size > 1:
            store = self._ranks.store()
            self._since = time.monotonic()
            self._threads = [
                threading.Thread(target=self._talk, args=(store,), daemon=True, name="watchdog-talk"),
                threading.Thread(target=self._judge, daemon=True, name="watchdog"),
            ]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        report = None
        # While this rank looks for who has gone, its own time must not run out and say something else.
        self._left.set()
        lost = lost_connection(error) if self._ranks.world_size > 1 else None
        if lost is not None:
            report = self._report(f"lost the connection ({lost})")
        self._done.set()
        for thread in self._threads:
            thread.join(self._beat)
        if report is not None:
            raise UnderpaintError(report) from error

    def _key(self, rank: int) -> str:
        return f"underpaint/{self._stage}/{rank}"

    def _talk(self, store: Any) -> None:
        """Say how far this rank is, and listen to the others."""
        keys = [self._key(rank) for rank in range(self._ranks.world_size)]
        beats = 0
        while not self._done.wait(self._beat if beats else 0.0):
            beats += 1
            try:
                store.set(keys[self._ranks.rank], json.dumps([beats, *self._now, self._leaves]))
                # To ask for what a rank has not said yet would be to wait for it.
                ranks = [rank for rank, key in enumerate(keys) if rank in self._heard or store.check([key])]
                heard = [value.decode() for value in store.multi_get([keys[rank] for rank in ranks])]
            except RuntimeError:
                # The store has gone with its rank. All fall silent then, and that is what the report says.
                return
            now = time.monotonic()
            for rank, text in zip(ranks, heard, strict=True):
                if rank not in self._heard or self._heard[rank][0] != text:
                    self._heard[rank] = (text, now)
            self._rounds = beats

    def _judge(self) -> None:
        looked = time.monotonic()
        while not self._left.wait(self._beat):
            before, looked = looked, time.monotonic()
            if looked - before > (_MISSED + 1) * self._beat:
                # This process was stopped itself, as by Ctrl-Z or a suspended job: no time that others lost.
                self._since = looked
            if looked - self._since > self._timeout:
                what = f"has waited for {looked - self._since:.0f} s, longer than engine.timeout"
                print(f"Error: {self._report(what)}", file=sys.stderr, flush=True)
                os._exit(2)

    def _report(self, what: str) -> str:
        """Say what happened, so late that ranks that have died are known from those that notice it too."""
        step, does = self._now
        self._leaves = True
        self._listen()
        text = (
            f"Rank {self._ranks.rank} of {self._ranks.world_size} {what}, where stage '{self._stage}' {does} step "
            f"{step}: {self._suspects()}. Look at what that rank wrote last, and run the same command to go on from "
            "the last checkpoint."
        )
        if self._ranks.is_main:
            # The store often lives in its process, and the others still ask it.
            time.sleep((_MISSED + 1) * self._beat)
        return text

    def _listen(self) -> None:
        """Wait until a rank that is silent has been heard to be: in rounds of `_talk`, which a busy machine delays."""
        start, until = time.monotonic(), self._rounds + _MISSED + 2
        time.sleep((_MISSED + 1) * self._beat)
        while self._rounds < until and self._threads[0].is_alive():
            if time.monotonic() - start > 3 * (_MISSED + 1) * self._beat:
                return
            time.sleep(self._beat / 4)

    def _suspects(self) -> str:
        """Say who keeps the others waiting, as far as this rank can know."""
        own = self._ranks.rank
        heard = {rank: (*json.loads(text)[1:], when) for rank, (text, when) in dict(self._heard).items()}
        # Ranks that leave as this one does are no suspects, whether they are gone already or not.
        left = [rank for rank, (_, _, leaves, _) in heard.items() if leaves]
        # Every round brings this rank its own words. Once the store is gone, the last round is all there is to go by.
        listened = heard[own][-1] if own in heard else -math.inf
        if time.monotonic() - listened > _MISSED * self._beat and 0 not in left:
            return "rank 0, through which the ranks hear of each other, does not answer"
        answer = [rank for rank, (*_, when) in heard.items() if listened - when <= _MISSED * self._beat]
        known = (own, *answer, *left)
        silent = [rank for rank in range(self._ranks.world_size) if rank not in known]
        if silent:
            return _listed([f"rank {rank} does not answer" for rank in silent])
        places = {rank: (step, _PLACES.index(does)) for rank, (step, does, *_) in heard.items()}
        first = min(places.values())
        late = [rank for rank in sorted(places) if places[rank] == first]
        if len(late) == len(places):
            return "all ranks answer, and are at the same place"
        return _listed([f"rank {rank} answers, but still {_PLACES[first[1]]} step {first[0]}" for rank in late])


def _listed(items: list[str]) -> str:
    return ", ".join(items[:_NAMED]) + (f", and {len(items) - _NAMED} more" if len(items) > _NAMED else "")
