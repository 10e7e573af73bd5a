"""Signals that ask a process to stop: SIGINT, SIGTERM and SIGHUP.

The first one asks; what is at work decides how it ends. The same one again ends the process at
once. Two different ones are one wish: Jupyter and systemd send one after the other.
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
"""Within this time the same signal again is the same wish: a terminal sends it to several."""


class StopNow(BaseException):
    """A signal ended the work where it stood; not an `Exception`, so that no library keeps it."""


class Signals:
    """Signals that came in.

    Args:
        first: Called with the name of the first.
    """

    def __init__(self, first: Callable[[str], None]) -> None:
        self._first = first
        self._at = 0.0
        self.asked: str | None = None
        """Name of the first signal."""

    def take(self, number: int, _: FrameType | None = None) -> None:
        """A signal's handler."""
        name = signal.Signals(number).name
        if self.asked is None:
            self.asked, self._at = name, time.monotonic()
            self._first(name)
        elif name == self.asked and time.monotonic() - self._at > SAME_S:
            os._exit(128 + number)


@contextlib.contextmanager
def on_signals(first: Callable[[str], None]) -> Iterator[Signals]:
    """Take signals while a block runs; does nothing outside the main thread.

    A signal that is ignored stays so, as `nohup` wants it.

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


def _stop_now(name: str) -> None:
    raise StopNow(name)


def raised() -> contextlib.AbstractContextManager[Signals]:
    """In this block the first signal raises `StopNow`."""
    return on_signals(_stop_now)


def follow_parent() -> None:
    """In a forked child: its parent alone hears signals, and takes it along when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to children too
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
