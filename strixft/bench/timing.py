"""Time of work on a device, and clock, temperature and power meanwhile."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from strixft.guard.sensors import AMD_SENSORS, Reading

LEAST_TURN_S = 0.1
"""Seconds that a turn lasts at least, so that the clock and one launch do not matter."""

MOST_CALLS = 1000


def columns(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Return the columns of a quantity that was measured several times.

    Its median stands under its name; `spread` is highest less lowest, as a fraction of the median.
    """
    median = statistics.median(values)
    spread = (max(values) - min(values)) / median if median else 0.0
    return {name: median, "spread": spread, "repeats": len(values)}


def synchronize(device: str) -> None:
    """Wait until the device has finished its work."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], calls: int, device: str) -> float:
    """Return the seconds of one call, from several in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def direct_seconds(work: Callable[[], Any], calls: int, device: str) -> float:
    """Return the same by other means: torch's own events where there is a GPU."""
    if device != "cuda":
        return timeit.timeit(work, number=calls) / calls
    import torch

    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        work()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / calls


def rate_columns(
    name: str,
    amount: float,
    repeat: int,
    ours: Callable[[], float],
    direct: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """Return the columns of a rate, and its difference to a direct measurement.

    The two take turns, so that a busy machine disturbs both alike.

    Args:
        name: Name of the rate, with its unit.
        amount: Work that is timed, in the unit of the rate.
        repeat: Number of turns.
        ours: Returns the seconds of the work.
        direct: Returns them by other means.
    """
    turns = [(ours(), direct() if direct else 0.0) for _ in range(repeat)]
    found = columns(name, [amount / seconds for seconds, _ in turns])
    if direct:
        found[f"direct_{name}"] = statistics.median(amount / seconds for _, seconds in turns)
        found["off"] = statistics.median(theirs / mine for mine, theirs in turns) - 1
    return found


def work_columns(
    name: str,
    amount: float,
    repeat: int,
    work: Callable[[], Any],
    device: str,
    *,
    check: bool = False,
) -> dict[str, Any]:
    """Warm work up, call it often enough in each turn, and return `rate_columns` of one call."""
    work()
    once = seconds_of(work, 2, device)
    calls = max(1, min(MOST_CALLS, round(LEAST_TURN_S / max(once, 1e-9))))
    direct = (lambda: direct_seconds(work, calls, device)) if check else None
    return rate_columns(name, amount, repeat, lambda: seconds_of(work, calls, device), direct)


EVERY_S = 1.0


@contextlib.contextmanager
def watched(read: Callable[[], Reading]) -> Iterator[Reading]:
    """Read sensors every second within the block; the summary is filled at its end.

    It holds the median clock and power and the highest temperature.
    """
    readings: list[Reading] = []
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(EVERY_S):
            readings.append(read())

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    summary: Reading = {}
    try:
        yield summary
    finally:
        ended.set()
        thread.join()
        for name in AMD_SENSORS:
            if values := [one[name] for one in readings or [read()] if name in one]:
                value = max(values) if name == "temperature_c" else statistics.median(values)
                summary[name] = round(value, 1)
