"""A polite stop: the first signal asks for a checkpoint, the second ends the process."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopRequest"]

_NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")


class StopRequest:
    """Context in which SIGTERM, SIGUSR1 and SIGINT are noted once.

    A second signal of the same kind restores the handlers that were there before and ends the program at once:
    SIGINT by KeyboardInterrupt, the others by SystemExit with 128 + the signal's number, as a shell counts.

    Python delivers signals to the main thread only; in another thread the context changes nothing.

    Attributes:
        requested: Name of the first signal, such as ``"SIGTERM"``; None while there was none.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._seen: set[int] = set()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                number = getattr(signal, name, None)
                if number is not None:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not installed from Python and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in self._seen:
            self._restore()
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        self._seen.add(number)
        if self.requested is None:
            self.requested = signal.Signals(number).name
