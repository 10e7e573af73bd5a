"""Threads that act before the host freezes for lack of memory, and when the device hangs."""

from __future__ import annotations

import faulthandler
import re
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from strixft.catalog.hosts import available_host_memory, read_amd_cards, read_meminfo
from strixft.support.errors import FitError, HostError
from strixft.support.units import format_gib, format_seconds

Level = Literal["calm", "warn", "stop", "exit"]

EVERY_S = 0.5

STALLED_PERCENT = 25.0
"""Share of time in which every process waits for memory: more than that, with less than the reserve
left, the kernel is thrashing, and the watch asks for a stop."""


_FULL = re.compile(r"^full avg10=([\d.]+)", re.MULTILINE)

_RESIDENT = re.compile(r"^VmRSS:\s*(\d+) kB", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Memory of the host at one moment, in bytes; None if the kernel does not say."""

    total_bytes: int
    available_bytes: int
    """Memory that a new process could take."""
    swap_used_bytes: int
    gtt_used_bytes: int | None
    vram_used_bytes: int | None
    process_bytes: int | None
    """Resident memory of this process."""
    stalled_percent: float | None
    """Share of the last ten seconds in which every process waited for memory."""

    @property
    def left_bytes(self) -> int:
        """Memory that the host has left: by the kernel, or less if the GPU leaves less.

        A driver may or may not count device memory as used (ggml-org/llama.cpp PR #20472,
        ROCm/ROCm#5444).
        """
        return min(self.available_bytes, self.total_bytes - (self.gtt_used_bytes or 0))


def _match(pattern: re.Pattern[str], path: Path) -> str | None:
    try:
        found = pattern.search(path.read_text())
    except (OSError, UnicodeDecodeError):
        return None
    return found[1] if found else None


def _sum(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def read_counters(root: Path = Path("/")) -> Counters:
    """Read all counters.

    Args:
        root: Folder that holds `/proc` and `/sys`.

    Raises:
        HostError: The kernel does not say how much memory is available.
    """
    info, cards = read_meminfo(root), read_amd_cards(root)
    stalled = _match(_FULL, root / "proc/pressure/memory")
    resident = _match(_RESIDENT, root / "proc/self/status")
    return Counters(
        total_bytes=info["MemTotal"],
        available_bytes=int(available_host_memory(root).value),
        swap_used_bytes=info.get("SwapTotal", 0) - info.get("SwapFree", 0),
        gtt_used_bytes=_sum([card.gtt_used for card in cards]),
        vram_used_bytes=_sum([card.vram_used for card in cards]),
        process_bytes=None if resident is None else int(resident) * 1024,
        stalled_percent=None if stalled is None else float(stalled),
    )


def growth(before: Counters, now: Counters) -> str:
    """Name the users of memory that grew, with their growth."""
    names = {
        "device memory in GTT": "gtt_used_bytes",
        "device memory in VRAM": "vram_used_bytes",
        "this process": "process_bytes",
        "swap": "swap_used_bytes",
    }
    taken = before.available_bytes - now.available_bytes
    grown = {
        words: (getattr(now, name) or 0) - (getattr(before, name) or 0)
        for words, name in names.items()
    }
    grown["other programs"] = taken - max(grown["this process"], grown["device memory in GTT"], 0)
    parts = [f"{words} +{format_gib(size)}" for words, size in grown.items() if size >= 2**20 * 64]
    return ", ".join(parts) or "none above 0.06 GiB"


def level_of(counters: Counters, reserve_bytes: int) -> Level:
    """Return how serious the state of the host's memory is.

    Args:
        counters: The state.
        reserve_bytes: Memory that the host keeps for itself.
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
        reserve_bytes: Memory that the host keeps for itself; 0 turns the watch off.
        warn: Called once, with the text, when the reserve is reached.
        ask: Called once, with the error, when the run should stop.
        leave: Called once, with the error, when the process must end now.
        tell: Called with every reading.
        root: Folder that holds `/proc` and `/sys`.
        every_s: Time between two readings.
    """

    def __init__(
        self,
        reserve_bytes: int,
        *,
        warn: Callable[[str], None],
        ask: Callable[[FitError], None],
        leave: Callable[[FitError], None],
        tell: Callable[[Counters], None] = lambda now: None,
        root: Path = Path("/"),
        every_s: float = EVERY_S,
    ) -> None:
        super().__init__(name="memory watch", daemon=True)
        self._tell = tell
        self._reserve, self._root, self._every_s = reserve_bytes, root, every_s
        self._acts = {
            "warn": lambda now: warn(self._words(now)),
            "stop": lambda now: ask(self._error(now)),
            "exit": lambda now: leave(self._error(now)),
        }
        self._before = read_counters(root)
        self._ended = threading.Event()
        self.least_left_bytes = self._before.left_bytes
        """Least memory that the host has had left so far."""

    def require_reserve(self) -> None:
        """Refuse to begin if the host has less left than would stop the run.

        Raises:
            FitError: Less than half of the reserve is left.
        """
        if level_of(self._before, self._reserve) in ("stop", "exit"):
            raise FitError(
                f"the host has {format_gib(self._before.left_bytes)} left, and its reserve is"
                f" {format_gib(self._reserve)}",
                fix="close other programs, or --set memory.reserve_gib=… with a new --run-dir",
            )

    def __enter__(self) -> MemoryWatch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        """Check until the watch ends; each level acts once."""
        while not self._ended.wait(self._every_s):
            self.look()

    def look(self) -> Level:
        """Read the counters once and act."""
        try:
            now = read_counters(self._root)
        except HostError:  # a reading that fails does not end a run
            return "calm"
        self.least_left_bytes = min(self.least_left_bytes, now.left_bytes)
        self._tell(now)
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
            f" {format_gib(self._reserve)}{waits}; growth since the start:"
            f" {growth(self._before, now)}"
        )

    def _error(self, now: Counters) -> FitError:
        return FitError(
            f"stopped before the host runs out of memory: {self._words(now)}",
            fix="close other programs, or --set memory.reserve_gib, train.micro_batch=1 or a"
            " smaller dataset.max_length with a new --run-dir",
        )


TIMES_MEDIAN = 10
"""Times the median of a micro-batch that count as a hang."""

LEAST_S = 120.0
"""Shortest wait: a compilation for a new shape may take a minute or two on a slow host."""

FIRST = 3
"""Micro-batches before the median counts; the first ones compile and warm up."""

GRACE_S = 30.0
"""Delay until the C thread ends the process if the other has not."""


class HangWatch(threading.Thread):
    """Acts if no micro-batch ends within ten times the median: a device that hangs stays so.

    A call that hangs may hold Python's lock, so there are two watches: this thread, which writes
    the reason down, and `faulthandler`'s C thread, which dumps the stacks and ends the process.

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
