"""Time of work on a device: warmed up, repeated, median and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

LEAST_TURN_S = 0.1
"""A turn repeats its work until it lasts this long: the clock and one launch do not count then."""

MOST_CALLS = 1000


@dataclass(frozen=True, slots=True)
class Sample:
    """The same figure, some times."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Highest less lowest, as a fraction of the median."""
        return (max(self.values) - min(self.values)) / self.median if self.median else 0.0

    def beside(self, other: Sample) -> float:
        """By how much this is more than another, turn by turn: the median as a fraction."""
        pairs = zip(self.values, other.values, strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs) - 1

    def per(self, amount: float) -> Sample:
        """Amount per second, from seconds."""
        return Sample(tuple(amount / value for value in self.values))


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], calls: int, device: str) -> float:
    """Seconds of one call, from so many in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def direct_seconds(work: Callable[[], Any], calls: int, device: str) -> float:
    """The same with nothing of ours: torch's own events where there is a GPU."""
    if device != "cuda":
        start = time.perf_counter_ns()
        for _ in range(calls):
            work()
        return (time.perf_counter_ns() - start) / 1e9 / calls
    import torch

    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        work()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / calls


def calls_of(work: Callable[[], Any], device: str) -> int:
    """Warm up, and find how many calls a turn needs."""
    work()
    once = seconds_of(work, 2, device)
    return max(1, min(MOST_CALLS, round(LEAST_TURN_S / max(once, 1e-9))))


def take_turns(options: Mapping[str, Callable[[], float]], repeat: int) -> dict[str, Sample]:
    """Values of some ways to measure; they take turns, so that a busy machine hits all.

    Args:
        options: Name → one measurement.
        repeat: Turns.
    """
    values: dict[str, list[float]] = {name: [] for name in options}
    for _ in range(repeat):
        for name, measure in options.items():
            values[name].append(measure())
    return {name: Sample(tuple(found)) for name, found in values.items()}


def time_work(
    work: Callable[[], Any], device: str, repeat: int, *, check: bool = False
) -> dict[str, Sample]:
    """Seconds of one call: `ours`, and `direct` beside it where a check is asked for."""
    calls = calls_of(work, device)
    options = {"ours": lambda: seconds_of(work, calls, device)}
    if check:
        options["direct"] = lambda: direct_seconds(work, calls, device)
    return take_turns(options, repeat)


def figures(times: Mapping[str, Sample], amount: float, name: str) -> dict[str, Any]:
    """Median rate and spread of what `time_work` gave, and how far the direct way is off.

    Args:
        times: Seconds of one call.
        amount: What one call does, in the unit of the rate.
        name: The rate's name, with its unit.
    """
    rate = times["ours"].per(amount)
    found: dict[str, Any] = {
        name: rate.median,
        "spread": rate.spread,
        "repeats": len(rate.values),
    }
    if "direct" in times:
        direct = times["direct"].per(amount)
        found |= {f"direct_{name}": direct.median, "off": rate.beside(direct)}
    return found
