"""The first signal asks, the same one again ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from strixft.support.signals import SIGNALS, StopNow, on_signals, raised


def work_until(number: signal.Signals) -> None:
    """Work that a signal interrupts."""
    with raised():
        os.kill(os.getpid(), number)
        time.sleep(5)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_ends_the_work_where_it_stands(number: signal.Signals) -> None:
    with pytest.raises(StopNow, match=number.name):
        work_until(number)


def test_the_first_signal_may_only_ask() -> None:
    asked: list[str] = []
    with on_signals(asked.append) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a second later it would end this process
        os.kill(os.getpid(), signal.SIGHUP)
    assert asked == ["SIGTERM"]
    assert signals.asked == "SIGTERM"


def test_handlers_are_what_they_were_before() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with raised():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raised():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_nothing_is_taken() -> None:
    found: list[object] = []

    def work() -> None:
        with raised():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


TWICE = """
import os, signal, time
from strixft.support import signals
signals.SAME_S = 0.05
with signals.on_signals(lambda name: print(name, flush=True)):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here")
"""


def test_the_same_signal_again_ends_the_process_at_once() -> None:
    found = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True)
    assert found.returncode == 128 + signal.SIGINT
    assert found.stdout == "SIGINT\n"
