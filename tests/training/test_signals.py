"""The first signal is noted, the second ends the program."""

from __future__ import annotations

import signal
import threading

import pytest

from underpaint.training.signals import StopRequest


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_the_first_is_noted_and_handlers_come_back(name):
    before = signal.getsignal(getattr(signal, name))
    with StopRequest() as stop:
        assert stop.requested is None
        signal.raise_signal(getattr(signal, name))
        assert stop.requested == name
    assert signal.getsignal(getattr(signal, name)) is before


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_second_one_exits(name, code):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopRequest():
        signal.raise_signal(number)
        with pytest.raises(SystemExit) as caught:
            signal.raise_signal(number)
        assert signal.getsignal(number) is before
    assert caught.value.code == code == 128 + number


def test_a_second_interrupt_is_the_usual_one():
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_two_different_ones_are_two_first_ones():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested == "SIGUSR1"


def test_another_thread_changes_nothing():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run() -> None:
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.requested))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(before, None)]
