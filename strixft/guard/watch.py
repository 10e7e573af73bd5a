"""A thread that reads the host's memory twice a second, and acts before the host freezes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from strixft.errors import FitError, HostError
from strixft.guard.counters import Counters, read_counters, what_grew
from strixft.units import format_gib

Level = Literal["calm", "warn", "stop", "exit"]
EVERY_S = 0.5
STALLED_PERCENT = 25.0
"""Below the reserve, this much waiting for memory counts as half of it: the kernel is thrashing."""


def level_of(counters: Counters, reserve_bytes: int) -> Level:
    """What the host's memory calls for.

    Args:
        counters: Read now.
        reserve_bytes: What the host keeps for itself.
    """
    left = counters.left_bytes
    if left >= reserve_bytes:
        return "calm"
    if left < reserve_bytes / 4:
        return "exit"
    stalled = (counters.stalled_percent or 0) >= STALLED_PERCENT
    return "stop" if stalled or left < reserve_bytes / 2 else "warn"


class MemoryWatch(threading.Thread):
    """Warns below the reserve, asks for a stop at half of it, leaves at once at a quarter.

    Args:
        reserve_bytes: What the host keeps for itself; 0 watches nothing.
        warn: Called once, with the text, when the reserve is reached.
        ask: Called once, with the error, when the run should stop.
        leave: Called once, with the error, when the process must end now.
        root: Where `/proc` and `/sys` are found.
        every_s: Time between two looks.
    """

    def __init__(
        self,
        reserve_bytes: int,
        *,
        warn: Callable[[str], None],
        ask: Callable[[FitError], None],
        leave: Callable[[FitError], None],
        root: Path = Path("/"),
        every_s: float = EVERY_S,
    ) -> None:
        super().__init__(name="memory watch", daemon=True)
        self._reserve, self._root, self._every_s = reserve_bytes, root, every_s
        self._acts = {
            "warn": lambda now: warn(self._words(now)),
            "stop": lambda now: ask(self._error(now)),
            "exit": lambda now: leave(self._error(now)),
        }
        self._before = read_counters(root)
        self._ended = threading.Event()
        self.least_left_bytes = self._before.left_bytes
        """The least that the host had left so far."""

    def require_reserve(self) -> None:
        """Refuse to begin where the host has less left than would stop the run.

        Raises:
            FitError: Less than half of the reserve is left.
        """
        if level_of(self._before, self._reserve) in ("stop", "exit"):
            raise FitError(
                f"the host has {format_gib(self._before.left_bytes)} left, and"
                f" {format_gib(self._reserve)} are its reserve",
                fix="close other programs, or --set memory.reserve_gib=… with a new --run-dir",
            )

    def __enter__(self) -> MemoryWatch:
        """Start watching."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        self._ended.set()
        self.join()

    def run(self) -> None:
        """Look, until the watch is ended; each level acts once."""
        while self._acts and not self._ended.wait(self._every_s):
            self.look()

    def look(self) -> Level:
        """Read the counters once and act."""
        try:
            now = read_counters(self._root)
        except HostError:  # a look that fails is no reason to end a run
            return "calm"
        self.least_left_bytes = min(self.least_left_bytes, now.left_bytes)
        level = level_of(now, self._reserve)
        act = self._acts.pop(level, None)
        if act is not None:
            act(now)
        return level

    def _words(self, now: Counters) -> str:
        stalled = now.stalled_percent or 0
        waits = f"; every process waited for memory {stalled:.0f} % of the time" if stalled else ""
        return (
            f"the host has {format_gib(now.left_bytes)} left of its reserve of"
            f" {format_gib(self._reserve)}{waits}; since the start grew:"
            f" {what_grew(self._before, now)}"
        )

    def _error(self, now: Counters) -> FitError:
        return FitError(
            f"stopped before the host runs out of memory: {self._words(now)}",
            fix="close other programs, or --set memory.reserve_gib, train.micro_batch=1 or a"
            " smaller dataset.max_length with a new --run-dir",
        )
