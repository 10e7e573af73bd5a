"""What the kernel says of memory, read from `/proc` and `/sys` below a root that can be given."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from strixft.hardware import available_host_memory, read_amd_cards, read_meminfo
from strixft.units import format_gib

_FULL = re.compile(r"^full avg10=([\d.]+)", re.MULTILINE)
_RESIDENT = re.compile(r"^VmRSS:\s*(\d+) kB", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Memory of the host at one moment, in bytes; None where the kernel does not say."""

    total_bytes: int
    available_bytes: int
    """What a new process could take."""
    swap_used_bytes: int
    gtt_used_bytes: int | None
    vram_used_bytes: int | None
    process_bytes: int | None
    """Resident memory of this process."""
    stalled_percent: float | None
    """Share of the last ten seconds in which every process waited for memory."""

    @property
    def left_bytes(self) -> int:
        """What the host has left: the worse of the kernel's word and what the GPU leaves.

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
        root: Where `/proc` and `/sys` are found.

    Raises:
        HostError: The kernel does not say what is available.
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


def what_grew(before: Counters, now: Counters) -> str:
    """What took the memory that was there before, in words."""
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
    return ", ".join(parts) or "nothing by more than 0.06 GiB"
