"""Clock, temperature and power of the device, as far as its driver tells them."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import psutil

from strixft.catalog.hosts import read_amd_cards, read_int

AMD_SENSORS = {
    "clock_mhz": ("freq1_input", 1e6),
    "temperature_c": ("temp1_input", 1e3),
    "power_w": ("power1_average", 1e6),
}
"""Name → file of amdgpu's hwmon and divisor (kernel documentation, gpu/amdgpu/thermal)."""

NVIDIA_SMI = (
    *("nvidia-smi", "--query-gpu=clocks.sm,temperature.gpu,power.draw"),
    *("--format=csv,noheader,nounits", "--id=0"),
)
"""Command that prints the same three."""

Reading = dict[str, float]


def _read_cpu() -> Reading:
    found, heat = Reading(), psutil.sensors_temperatures() or {}
    if (clock := psutil.cpu_freq()) is not None:
        found["clock_mhz"] = clock.current
    for name in ("k10temp", "coretemp"):
        if sensors := heat.get(name):
            found["temperature_c"] = sensors[0].current
    return found


def read_sensors(device: str, root: Path = Path("/")) -> Reading:
    """Return clock, temperature and power of a device, as far as its driver tells them."""
    with contextlib.suppress(
        OSError, ValueError, RuntimeError, NotImplementedError, subprocess.SubprocessError
    ):
        if device == "cpu":
            return _read_cpu()
        if cards := read_amd_cards(root):
            return {
                name: value / scale
                for name, (file, scale) in AMD_SENSORS.items()
                for path in cards[0].folder.glob(f"hwmon/hwmon*/{file}")
                if (value := read_int(path)) is not None
            }
        done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=5, check=True)
        return dict(zip(AMD_SENSORS, map(float, done.stdout.split(",")), strict=True))
    return {}
