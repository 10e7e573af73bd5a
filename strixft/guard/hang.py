"""A device that hangs never comes back by itself; somebody has to notice.

Two watches, since a call that hangs may hold Python's lock: a thread that leaves word, and the C
thread of `faulthandler`, which only dumps the stacks and ends the process.
"""

from __future__ import annotations

import faulthandler
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from strixft.support.errors import HostError
from strixft.support.units import format_seconds

TIMES_MEDIAN = 10

LEAST_S = 120.0
"""A compilation for a new shape may take a minute or two on a slow host."""

FIRST = 3
"""Micro-batches before the median counts; the first ones compile and warm up."""

GRACE_S = 30.0
"""How much later the C thread ends the process, if the other has not."""


class HangWatch(threading.Thread):
    """Acts when no micro-batch has ended within ten times the median.

    Args:
        stacks: Where the stacks of all threads are written.
        leave: Called with the error; should end the process.
        least_s: Shortest wait.
        grace_s: How much later the process is ended in any case.
    """

    def __init__(
        self,
        stacks: Path,
        leave: Callable[[HostError], None],
        *,
        least_s: float = LEAST_S,
        grace_s: float = GRACE_S,
    ) -> None:
        super().__init__(name="hang watch", daemon=True)
        self._stacks, self._leave = stacks, leave
        self._least_s, self._grace_s = least_s, grace_s
        self._seconds: deque[float] = deque(maxlen=101)
        self._last: float | None = None
        self._ended = threading.Event()

    def __enter__(self) -> HangWatch:
        """Start watching."""
        self._file = self._stacks.open("w")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching; the file stays if stacks are in it."""
        self.pause()
        self._ended.set()
        self.join()
        self._file.close()
        if not self._stacks.stat().st_size:
            self._stacks.unlink()

    def limit_s(self) -> float | None:
        """How long a micro-batch may take; None as long as too few are known."""
        if len(self._seconds) < FIRST:
            return None
        return max(self._least_s, TIMES_MEDIAN * statistics.median(self._seconds))

    def beat(self) -> None:
        """A micro-batch has ended."""
        now = time.monotonic()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now
        limit = self.limit_s()
        if limit is not None:
            wait = limit + self._grace_s
            faulthandler.dump_traceback_later(wait, exit=True, file=self._file)

    def pause(self) -> None:
        """What comes now is no micro-batch."""
        self._last = None
        faulthandler.cancel_dump_traceback_later()

    def run(self) -> None:
        """Look, until the watch is ended."""
        while not self._ended.wait(min(1.0, self._least_s / 4)):
            last, limit = self._last, self.limit_s()
            if last is None or limit is None:
                continue
            if time.monotonic() - last > limit:
                faulthandler.dump_traceback(file=self._file, all_threads=True)
                self._leave(self._error(limit))
                return

    def _error(self, limit: float) -> HostError:
        return HostError(
            f"the device hangs: no micro-batch ended within {format_seconds(limit)};"
            f" the stacks are in {self._stacks}",
            fix="sudo dmesg | grep -i amdgpu   shows what the driver says; restart the machine if"
            " the device stays away, then type the same command again",
        )
