"""Which processes hold GPU memory now, and how to stop them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from strixft.doctor.finding import Finding, Fix
from strixft.doctor.view import HostView, plausible
from strixft.units import GIB, format_gib

DESKTOP = 4 * GIB
"""A desktop with two screens holds less."""
STOP = {
    "ollama": "sudo systemctl stop ollama",
    "lemonade": "lemonade-server stop || sudo systemctl stop lemonade-server",
    "lemond": "sudo systemctl stop lemonade-server",
}
"""How a server is stopped that would start its worker again, by the beginning of its name."""
SOURCE = "https://docs.kernel.org/gpu/drm-usage-stats.html; /sys/class/kfd/kfd/proc"


@dataclass(frozen=True, slots=True)
class Holder:
    """A process and the device memory that it holds."""

    pid: int
    name: str
    num_bytes: int

    @property
    def stop(self) -> str:
        """What ends it."""
        known = (stop for name, stop in STOP.items() if self.name.startswith(name))
        return next(known, f"kill {self.pid}")


def _drm_bytes(text: str) -> tuple[str, int] | None:
    """Client and bytes from one `fdinfo` file of amdgpu."""
    if "drm-driver:\tamdgpu" not in text.replace("drm-driver: ", "drm-driver:\t"):
        return None
    client = re.search(r"drm-client-id:\s*(\d+)", text)
    regions = {
        name: int(value) * 1024
        for name, value in re.findall(r"drm-(?:memory|resident)-(gtt|vram):\s*(\d+) KiB", text)
    }
    return (client[1] if client else "", sum(regions.values()))


def _held_by(view: HostView, pid: str) -> int:
    """Bytes of one process: of its graphics clients, or of its compute queues if that is more."""
    clients: dict[str, int] = {}
    for path in view.glob(f"/proc/{pid}/fdinfo/*"):
        text = view.read(path)
        if text and "drm-driver" in text and (found := _drm_bytes(text)):
            clients[found[0]] = max(found[1], clients.get(found[0], 0))
    compute = sum(
        view.read_int(path) or 0 for path in view.glob(f"/sys/class/kfd/kfd/proc/{pid}/vram_*")
    )
    return max(sum(clients.values()), plausible(compute) or 0)


def _own(pid: str) -> bool:
    return pid == str(os.getpid())


def holders(view: HostView) -> list[Holder]:
    """Processes that hold device memory, the largest first; those of others only as root."""
    pids = [path.name for path in view.glob("/proc/[0-9]*")]
    held = {pid: _held_by(view, pid) for pid in pids if not _own(pid)}
    found = [
        Holder(int(pid), view.read(f"/proc/{pid}/comm") or "?", num_bytes)
        for pid, num_bytes in held.items()
        if num_bytes > 0
    ]
    return sorted(found, key=lambda holder: -holder.num_bytes)


def check_holders(view: HostView) -> Iterator[Finding]:
    """Memory that a run will not get while others hold it."""
    card = view.strix_halo
    if card is None:
        return
    used = (plausible(card.gtt_used) or 0) + (plausible(card.vram_used) or 0)
    found = holders(view)
    large = [holder for holder in found if holder.num_bytes > GIB]
    saw = f"{format_gib(used)} in use ({view.shown(card.folder)}/mem_info_gtt_used, …vram_used)"
    why = "a run gets what is left; an inference server keeps its model for minutes or for ever"
    if used <= DESKTOP and sum(holder.num_bytes for holder in large) <= DESKTOP:
        yield Finding(status="ok", saw=saw, why=why, source=SOURCE)
        return
    names = ", ".join(f"{h.name} (pid {h.pid}) {format_gib(h.num_bytes)}" for h in large[:5])
    yield Finding(
        status="warn",
        saw=f"{saw}: {names or 'by processes that only root can see'}",
        why=why,
        fix=Fix("stop them before training", tuple(dict.fromkeys(h.stop for h in large[:5])))
        if large
        else Fix("see who it is", ("sudo strixft doctor --no-torch",)),
        source=SOURCE,
    )
