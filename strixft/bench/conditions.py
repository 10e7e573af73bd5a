"""Clock, temperature and power while a bench runs, as far as the driver tells."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from strixft.catalog.hosts import read_amd_cards

EVERY_S = 1.0

UNITS = {"clock_mhz": "freq1_input", "temperature_c": "temp1_input", "power_w": "power1_average"}
"""Figure → file of amdgpu's hwmon (kernel documentation, gpu/amdgpu/thermal)."""

SCALES = {"clock_mhz": 1e6, "temperature_c": 1e3, "power_w": 1e6}

ASK = "--query-gpu=clocks.sm,temperature.gpu,power.draw"


Reading = dict[str, float]


def _amd(root: Path) -> Reading:
    found: Reading = {}
    for card in read_amd_cards(root)[:1]:
        for name, file in UNITS.items():
            for path in sorted(card.folder.glob(f"hwmon/hwmon*/{file}")):
                with contextlib.suppress(OSError, ValueError):
                    found[name] = int(path.read_text()) / SCALES[name]
    return found


def _nvidia() -> Reading:
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", ASK, "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        values = [float(word) for word in done.stdout.split(",")]
        return dict(zip(SCALES, values, strict=True))
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}


def _cpu() -> Reading:
    found: Reading = {}
    with contextlib.suppress(OSError, RuntimeError, NotImplementedError):
        if (clock := psutil.cpu_freq()) is not None:
            found["clock_mhz"] = clock.current
    for name, sensors in (psutil.sensors_temperatures() or {}).items():
        if name in ("k10temp", "coretemp") and sensors:
            found["temperature_c"] = sensors[0].current
    return found


def reader(device: str, root: Path = Path("/")) -> Callable[[], Reading]:
    """What reads the sensors of a device."""
    if device == "cpu":
        return _cpu
    return (lambda: _amd(root)) if read_amd_cards(root) else _nvidia


def _summary(readings: list[Reading]) -> Reading:
    """Median clock and power, highest temperature."""
    summary: Reading = {}
    for name in SCALES:
        values = [reading[name] for reading in readings if name in reading]
        if values:
            middle = max(values) if name == "temperature_c" else statistics.median(values)
            summary[name] = round(middle, 1)
    return summary


@contextlib.contextmanager
def watched(read: Callable[[], Reading]) -> Iterator[Reading]:
    """Read the sensors each second while the block runs; the summary is filled at its end."""
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
        summary.update(_summary(readings or [read()]))
