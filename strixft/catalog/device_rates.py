"""Rates of this machine: measured here by `strixft bench`, else those of its chip in `HOSTS`.

Nothing here needs torch. `hosts.json` of the data folder holds the measured rates by device.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from strixft.catalog.hosts import HOSTS, Host, Sourced, read_amd_cards
from strixft.support.errors import HostError
from strixft.support.files import write_json

CHIPS = {
    "GB10": "dgx-spark",
    "V100": "v100-32",
    "H100 80GB HBM3": "h100-80",
    "H200": "h200-141",
}
"""Part of the name that the driver gives → row of `HOSTS`."""

STRIX_HALO = "strix-halo-128"

FORMAT = 1

FOLDER = "STRIXFT_DATA"
"""Variable with the data folder."""


def data_folder() -> Path:
    """Return the folder of measurements: that of `FOLDER`, or `~/.local/share/strixft`."""
    share = Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local/share"))
    return Path(os.environ.get(FOLDER) or share / "strixft")


def hosts_file() -> Path:
    """Return the file with the measured rates."""
    return data_folder() / "hosts.json"


def cpu_name(root: Path = Path("/")) -> str:
    """Return the kernel's name of the processor."""
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:
        return "unknown processor"
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1].strip() if found else "unknown processor"


def device_name(host: Host, root: Path = Path("/")) -> str:
    """Return the key of a device's rates: its name, or its number on the PCI bus."""
    if host.device == "cpu":
        return cpu_name(root)
    cards = read_amd_cards(root)
    return f"amd {cards[0].device_id}" if cards else host.name


def row_of(host: Host, root: Path = Path("/")) -> Host | None:
    """Return the row of `HOSTS` with the same chip, or None."""
    if host.name in HOSTS:
        return HOSTS[host.name]
    if host.device == "cpu":
        return None
    cards = read_amd_cards(root)
    if cards and cards[0].is_strix_halo:
        return HOSTS[STRIX_HALO]
    rows = (row for part, row in CHIPS.items() if not cards and part in host.name)
    return next((HOSTS[row] for row in rows), None)


def _read() -> dict[str, Any]:
    path = hosts_file()
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] == FORMAT:
            return dict(data["hosts"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise HostError(
        f"{path} holds no measured rates of this version",
        fix=f"mv {path} {path}.old, then: strixft bench bandwidth --host-row;"
        " strixft bench gemm --host-row",
    )


def write_rates(
    device: str, bandwidth: Sourced | None = None, matmul: Mapping[str, Sourced] | None = None
) -> Path:
    """Save measured rates of a device; other rates of it do not change.

    Args:
        device: As `device_name` returns it.
        bandwidth: Bytes per second.
        matmul: FLOP per second by dtype.

    Raises:
        HostError: The file belongs to another version.
    """
    hosts = _read()
    row = hosts.setdefault(device, {})
    if bandwidth:
        row["bandwidth_bytes_per_s"] = asdict(bandwidth)
    row.setdefault("matmul_flop_per_s", {}).update(
        {dtype: asdict(rate) for dtype, rate in (matmul or {}).items()}
    )
    path = hosts_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format": FORMAT, "hosts": hosts})
    return path


def with_rates(host: Host, root: Path = Path("/")) -> Host:
    """Return a host with the rates measured here, else with those of the same chip in `HOSTS`.

    Raises:
        HostError: The measured rates cannot be read.
    """
    row, measured = row_of(host, root), _read().get(device_name(host, root), {})
    names = ("bandwidth_bytes_per_s", "matmul_flop_per_s", "bus_bytes_per_s", "peak_flop_per_s")
    known: dict[str, Any] = {name: getattr(row, name) for name in names} if row else {}
    if bandwidth := measured.get("bandwidth_bytes_per_s"):
        known["bandwidth_bytes_per_s"] = Sourced(**bandwidth)
    if matmul := measured.get("matmul_flop_per_s"):
        rates = {dtype: Sourced(**rate) for dtype, rate in matmul.items()}
        known["matmul_flop_per_s"] = {**known.get("matmul_flop_per_s", {}), **rates}
    return replace(host, **known)
