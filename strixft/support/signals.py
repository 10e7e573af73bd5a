"""Signals that ask a process to stop: SIGINT, SIGTERM and SIGHUP.

The first signal asks the running work to end in its own way. The same signal again ends the process
at once. Two different signals count as one: Jupyter and systemd send one after the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_DIE_WITH_PARENT = 1
"""`PR_SET_PDEATHSIG` of linux/prctl.h."""

SAME_S = 1.0
"""A repeat within this time counts as the same signal: a terminal sends it to several processes."""


class StopNow(BaseException):
    """A signal ended the work at once; not an `Exception`, so that libraries do not catch it."""


class Signals:
    """A handler of signals that remembers the first.

    Args:
        first: Called with the name of the first signal.
    """

    def __init__(self, first: Callable[[str], None]) -> None:
        self._first = first
        self._at = 0.0
        self.asked: str | None = None
        """Name of the first signal."""

    def take(self, number: int, _: FrameType | None = None) -> None:
        """Handle a signal."""
        name = signal.Signals(number).name
        if self.asked is None:
            self.asked, self._at = name, time.monotonic()
            self._first(name)
        elif name == self.asked and time.monotonic() - self._at > SAME_S:
            os._exit(128 + number)


@contextlib.contextmanager
def on_signals(first: Callable[[str], None]) -> Iterator[Signals]:
    """Handle signals while a block runs; do nothing outside the main thread.

    A signal that is ignored stays ignored, as `nohup` needs.

    Args:
        first: Called with the name of the first signal.
    """
    taken = Signals(first)
    if threading.current_thread() is not threading.main_thread():
        yield taken
        return
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, taken.take) for number in heard}
    try:
        yield taken
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def raised() -> contextlib.AbstractContextManager[Signals]:
    """Raise `StopNow` at the first signal in this block."""

    def stop_now(name: str) -> None:
        raise StopNow(name)

    return on_signals(stop_now)


def follow_parent() -> None:
    """Leave signals to the parent of this forked child, and end together with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to children too
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
