"""Detect a device that hangs, which never recovers by itself.

There are two watches, since a call that hangs may hold Python's lock: a thread that writes the
reason down, and the C thread of `faulthandler`, which only dumps the stacks and ends the process.
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
"""Times the median of a micro-batch that count as a hang."""

LEAST_S = 120.0
"""Shortest wait: a compilation for a new shape may take a minute or two on a slow host."""

FIRST = 3
"""Micro-batches before the median counts; the first ones compile and warm up."""

GRACE_S = 30.0
"""Delay until the C thread ends the process if the other has not."""


class HangWatch(threading.Thread):
    """Acts if no micro-batch ends within ten times the median.

    Args:
        stacks: File for the stacks of all threads.
        leave: Called with the error; should end the process.
        least_s: Shortest wait.
        grace_s: Delay until the process is ended in any case.
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
        self._file = self._stacks.open("w")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching; the file stays if it has stacks."""
        self.pause()
        self._ended.set()
        self.join()
        self._file.close()
        if not self._stacks.stat().st_size:
            self._stacks.unlink()

    def limit_s(self) -> float | None:
        """Return the longest time for a micro-batch; None until enough have ended."""
        if len(self._seconds) < FIRST:
            return None
        return max(self._least_s, TIMES_MEDIAN * statistics.median(self._seconds))

    def beat(self) -> None:
        """Note the end of a micro-batch."""
        now = time.monotonic()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now
        limit = self.limit_s()
        if limit is not None:
            faulthandler.dump_traceback_later(limit + self._grace_s, exit=True, file=self._file)

    def pause(self) -> None:
        """Stop the clock until the next micro-batch ends."""
        self._last = None
        faulthandler.cancel_dump_traceback_later()

    def run(self) -> None:
        """Check until the watch ends."""
        while not self._ended.wait(min(1.0, self._least_s / 4)):
            last, limit = self._last, self.limit_s()
            if last is None or limit is None:
                continue
            if time.monotonic() - last > limit:
                faulthandler.dump_traceback(file=self._file, all_threads=True)
                error = HostError(
                    f"the device hangs: no micro-batch ended within {format_seconds(limit)};"
                    f" the stacks are in {self._stacks}",
                    fix="sudo dmesg | grep -i amdgpu   shows the driver's messages; restart the"
                    " machine if the device stays away, then run the same command again",
                )
                self._leave(error)
                return
