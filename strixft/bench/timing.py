"""Time of work on a device, and clock, temperature and power meanwhile.

Work is warmed up and repeated; a `Sample` holds its times with their median and spread.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from strixft.catalog.hosts import read_amd_cards

LEAST_TURN_S = 0.1
"""Seconds that a turn lasts at least, so that the clock and one launch do not matter."""

MOST_CALLS = 1000


@dataclass(frozen=True, slots=True)
class Sample:
    """Repeated measurements of one quantity."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the values."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Highest less lowest, as a fraction of the median."""
        return (max(self.values) - min(self.values)) / self.median if self.median else 0.0

    def beside(self, other: Sample) -> float:
        """Return by which fraction this exceeds another sample: the median, turn by turn."""
        pairs = zip(self.values, other.values, strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs) - 1

    def per(self, amount: float) -> Sample:
        """Return amount per second, from seconds."""
        return Sample(tuple(amount / value for value in self.values))

    def columns(self, name: str) -> dict[str, Any]:
        """Return the columns of a rate: its median under its name, spread and repeats."""
        return {name: self.median, "spread": self.spread, "repeats": len(self.values)}


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


def take_turns(measurements: Mapping[str, Callable[[], float]], repeat: int) -> dict[str, Sample]:
    """Run measurements in turns, so that a busy machine disturbs all of them alike."""
    values: dict[str, list[float]] = {name: [] for name in measurements}
    for _ in range(repeat):
        for name, measure in measurements.items():
            values[name].append(measure())
    return {name: Sample(tuple(found)) for name, found in values.items()}


def time_work(
    work: Callable[[], Any], device: str, repeat: int, *, check: bool = False
) -> dict[str, Sample]:
    """Return the seconds of one call: `ours`, and `direct` beside it if a check is wanted."""
    work()
    once = seconds_of(work, 2, device)
    calls = max(1, min(MOST_CALLS, round(LEAST_TURN_S / max(once, 1e-9))))
    measurements = {"ours": lambda: seconds_of(work, calls, device)}
    if check:
        measurements["direct"] = lambda: direct_seconds(work, calls, device)
    return take_turns(measurements, repeat)


def rate_columns(times: Mapping[str, Sample], amount: float, name: str) -> dict[str, Any]:
    """Return the median rate, its spread, and the difference to the direct measurement.

    Args:
        times: Seconds of one call, as `time_work` returns them.
        amount: Work of one call, in the unit of the rate.
        name: Name of the rate, with its unit.
    """
    rate = times["ours"].per(amount)
    columns = rate.columns(name)
    if "direct" in times:
        direct = times["direct"].per(amount)
        columns |= {f"direct_{name}": direct.median, "off": rate.beside(direct)}
    return columns


# Sensors.

EVERY_S = 1.0

AMD_SENSORS = {
    "clock_mhz": ("freq1_input", 1e6),
    "temperature_c": ("temp1_input", 1e3),
    "power_w": ("power1_average", 1e6),
}
"""Name → file of amdgpu's hwmon and divisor (kernel documentation, gpu/amdgpu/thermal)."""

NVIDIA_QUERY = "--query-gpu=clocks.sm,temperature.gpu,power.draw"

Reading = dict[str, float]


def _read_amd(root: Path) -> Reading:
    reading: Reading = {}
    for card in read_amd_cards(root)[:1]:
        for name, (file, scale) in AMD_SENSORS.items():
            for path in sorted(card.folder.glob(f"hwmon/hwmon*/{file}")):
                with contextlib.suppress(OSError, ValueError):
                    reading[name] = int(path.read_text()) / scale
    return reading


def _read_nvidia() -> Reading:
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", NVIDIA_QUERY, "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return dict(zip(AMD_SENSORS, map(float, done.stdout.split(",")), strict=True))
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}


def _read_cpu() -> Reading:
    reading: Reading = {}
    with contextlib.suppress(OSError, RuntimeError, NotImplementedError):
        if (clock := psutil.cpu_freq()) is not None:
            reading["clock_mhz"] = clock.current
    for name, sensors in (psutil.sensors_temperatures() or {}).items():
        if name in ("k10temp", "coretemp") and sensors:
            reading["temperature_c"] = sensors[0].current
    return reading


def sensors_of(device: str, root: Path = Path("/")) -> Callable[[], Reading]:
    """Return a function that reads the sensors of a device."""
    if device == "cpu":
        return _read_cpu
    return (lambda: _read_amd(root)) if read_amd_cards(root) else _read_nvidia


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
