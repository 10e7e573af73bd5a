"""Checks of the memory that the GPU may use: carve-out, TTM limit, parameters, other users."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from strixft.doctor.devices import bios_path
from strixft.doctor.finding import Finding, Fix, check
from strixft.doctor.host import AMD_DOC, FINETUNE_GUIDE, HostView, fix_kernel_arguments, plausible
from strixft.support.units import GIB, format_gib

PAGE = 4096

RESERVE_GIB = 16
"""Memory left to the host without a recipe; see the recipe's `memory.reserve_gib`."""

SMALL_CARVE_OUT = 2 * GIB

LEAST_SHARE = 0.75
"""Share of RAM; a lower limit is the default of about half, or nearly so."""

LEFT_FOR_HOST = 4 * GIB
"""A limit that leaves less than this to the host does not protect it."""

DESKTOP = 4 * GIB
"""A desktop with two screens holds less."""


def reserve_gib(view: HostView) -> float:
    """Return the memory that a run leaves to the host, in GiB."""
    return view.recipe.memory.reserve_gib if view.recipe else RESERVE_GIB


def recommended_gtt_gib(memory_total: int, reserve_gib: float) -> int:
    """Return RAM less the reserve in whole GiB, but at least half of RAM.

    >>> recommended_gtt_gib(125 * GIB, 16), recommended_gtt_gib(30 * GIB, 16)
    (109, 15)
    """
    total = round(memory_total / GIB)
    return max(int(total - reserve_gib), total // 2)


def _limit_argument(view: HostView) -> str:
    """The kernel argument for the recommended limit, with the module's name on this host."""
    gib = recommended_gtt_gib(view.memory_total or 0, reserve_gib(view))
    module = "amdttm" if view.exists("/sys/module/amdttm") else "ttm"
    return f"{module}.pages_limit={gib * GIB // PAGE}"


def _has_pages_limit(view: HostView) -> bool:
    names = ("ttm.pages_limit", "amdttm.pages_limit")
    return any(view.kernel_arguments.get(name) for name in names)


def _file_with_option(view: HostView, option: str) -> Path | None:
    """The file of `/etc/modprobe.d` that sets an option, such as `pages_limit`."""
    for path in view.glob("/etc/modprobe.d/*.conf"):
        if re.search(rf"^options\s.*\b{option}=", view.read(path) or "", re.MULTILINE):
            return path
    return None


def _edit_option(view: HostView, path: Path, edit: str) -> tuple[str, ...]:
    command = f"sudo sed -i -E '{edit}' {shlex.quote(view.shown(path))}"
    return tuple(filter(None, (command, view.family.initramfs)))


@check(
    "carve-out",
    why="the carve-out only shrinks what the host can use: with GTT larger than VRAM the driver"
    " places device memory in GTT",
    source=f"{AMD_DOC} (vendor); torvalds/linux@759e764",
    strix_halo=True,
)
def carve_out(view: HostView) -> Finding:
    """Check for a large carve-out, which the host loses and the GPU does not need."""
    vram = plausible(view.card.vram_total)
    where = f"{view.shown(view.card.folder)}/mem_info_vram_total"
    if vram is None:
        saw = f"{where} cannot be read or holds an impossible number: {view.card.vram_total}"
        fix = Fix("read the driver's messages", ("sudo dmesg | grep -i 'amdgpu.*VRAM'",))
        return Finding("unknown", saw, fix)
    if vram <= SMALL_CARVE_OUT:
        return Finding("ok", f"{format_gib(vram)} ({where})")
    fix = Fix(f"set it to 0.5 GB in the BIOS: {bios_path(view)}", restart="reboot")
    return Finding("warn", f"{format_gib(vram)} are carved out for VRAM ({where})", fix)


def _set_limit(view: HostView, say: str) -> Fix:
    """Change the limit in the file that sets it (AMD's `amd-ttm` writes one), else at boot."""
    argument = _limit_argument(view)
    path = _file_with_option(view, "pages_limit")
    if path is None or _has_pages_limit(view):
        old = tuple(name for name in ("amdgpu.gttsize",) if name in view.kernel_arguments)
        return fix_kernel_arguments(view, say, add=argument, remove=old)
    edit = rf"s/\b(pages_limit=)[0-9]+/\1{argument.partition('=')[2]}/"
    return Fix(say, _edit_option(view, path, edit), "reboot")


@check("gtt", source=AMD_DOC, strix_halo=True)
def gtt(view: HostView) -> Finding:
    """Compare the memory that the kernel lets the GPU map with RAM."""
    card, limit, total = view.card, plausible(view.card.gtt_total), plausible(view.memory_total)
    where = f"{view.shown(card.folder)}/mem_info_gtt_total"
    if limit is None or not total:
        saw = f"{where}: {card.gtt_total}; MemTotal: {view.memory_total}"
        fix = Fix("read both by hand", (f"cat {where}", "grep MemTotal /proc/meminfo"))
        why = "without both, the memory that a run may use is unknown"
        return Finding("unknown", saw, fix, why)
    saw = f"{format_gib(limit)} of {format_gib(total)} RAM ({where})"
    if limit < LEAST_SHARE * total and (card.vram_total or 0) < limit:
        better = recommended_gtt_gib(total, reserve_gib(view))
        return Finding(
            "warn",
            f"the GPU may map {saw}",
            _set_limit(view, f"raise the limit to {better} GiB"),
            "the default is about half of RAM: larger runs stop although there is memory left",
            f"{AMD_DOC} (vendor); antirez/ds4 PR #871 (measured: pages × 4096 = GTT)",
        )
    if limit > total - LEFT_FOR_HOST:
        return Finding(
            "warn",
            f"the GPU may map {saw}",
            _set_limit(view, "keep some for the host"),
            "a limit of all RAM leaves the host nothing: an over-commit freezes the machine"
            " instead of raising an error",
            f"{FINETUNE_GUIDE}; ROCm/ROCm#6370 (measured)",
        )
    return Finding("ok", saw, why="the GPU may map this much; the kernel refuses more")


@check(
    "memory-parameters",
    why="only pages_limit sets the limit",
    source="https://docs.kernel.org/gpu/amdgpu/module-parameters.html",
    strix_halo=True,
)
def parameters(view: HostView) -> list[Finding]:
    """Check for parameters that are deprecated or belong to another driver."""
    wrong = [*_find_gttsize(view), *_find_foreign(view)]
    return wrong or [Finding("ok", "no deprecated memory parameter (/proc/cmdline)")]


def _find_gttsize(view: HostView) -> Iterator[Finding]:
    value = view.read_int("/sys/module/amdgpu/parameters/gttsize")
    given = view.kernel_arguments.get("amdgpu.gttsize")
    if given is None and value in (None, -1):
        return
    path = _file_with_option(view, "gttsize")
    limit = "" if _has_pages_limit(view) else _limit_argument(view)
    say = "set the limit by ttm alone"
    if path is None or given is not None:
        fix = fix_kernel_arguments(view, say, add=limit, remove=("amdgpu.gttsize",))
    else:
        set_limit = fix_kernel_arguments(view, say, add=limit).commands if limit else ()
        edits = _edit_option(view, path, r"s/ ?\bgttsize=[0-9]+//")
        fix = Fix(say, (*edits, *set_limit), "reboot")
    yield Finding(
        "warn",
        f"amdgpu.gttsize={given or value} MiB ({view.shown(path) if path else '/proc/cmdline'})",
        fix,
        "the kernel calls gttsize deprecated and will remove it; two different limits hide the"
        " one that counts",
    )


def _find_foreign(view: HostView) -> Iterator[Finding]:
    """`amdttm.*` with the kernel's own driver, or `ttm.*` with AMD's."""
    out_of_tree = view.exists("/sys/module/amdttm")
    wrong = "ttm.pages_limit" if out_of_tree else "amdttm.pages_limit"
    driver = "AMD's (amdgpu-dkms)" if out_of_tree else "the kernel's own"
    if wrong in view.kernel_arguments:
        argument, say = _limit_argument(view), "use this driver's name"
        yield Finding(
            "warn",
            f"{wrong} in /proc/cmdline, but the driver is {driver} (/sys/module)",
            fix_kernel_arguments(view, say, add=argument, remove=(wrong,)),
            "the name belongs to the other driver, so the limit is not set",
            "ROCm/ROCm#5562, ROCm/ROCm#5595",
        )


STOP = {
    "ollama": "sudo systemctl stop ollama",
    "lemonade": "lemonade-server stop || sudo systemctl stop lemonade-server",
    "lemond": "sudo systemctl stop lemonade-server",
}
"""Commands for servers that restart a killed worker, by the beginning of the process name."""


def _held_bytes(view: HostView, pid: str) -> int:
    """Bytes of one process: of its graphics clients, or of its compute queues if that is more."""
    clients: dict[str, int] = {}
    for path in view.glob(f"/proc/{pid}/fdinfo/*"):
        text = view.read(path) or ""
        if re.search(r"drm-driver:[\t ]amdgpu", text):
            client = re.search(r"drm-client-id:\s*(\d+)", text)
            regions = re.findall(r"drm-(?:memory|resident)-(gtt|vram):\s*(\d+) KiB", text)
            held = sum(int(kib) * 1024 for kib in dict(regions).values())
            name = client[1] if client else ""
            clients[name] = max(held, clients.get(name, 0))  # several files share a client
    queues = view.glob(f"/sys/class/kfd/kfd/proc/{pid}/vram_*")
    compute = plausible(sum(view.read_int(path) or 0 for path in queues))
    return max(sum(clients.values()), compute or 0)


@check(
    "gpu-memory-use",
    why="a run gets what is left; an inference server keeps its model for minutes or forever",
    source="https://docs.kernel.org/gpu/drm-usage-stats.html; /sys/class/kfd/kfd/proc",
    strix_halo=True,
)
def use(view: HostView) -> Finding:
    """Check for memory that other processes hold; those of other users show only to root."""
    card = view.card
    used = (plausible(card.gtt_used) or 0) + (plausible(card.vram_used) or 0)
    pids = [path.name for path in view.glob("/proc/[0-9]*") if path.name != str(os.getpid())]
    large = {pid: held for pid in pids if (held := _held_bytes(view, pid)) > GIB}
    saw = f"{format_gib(used)} in use ({view.shown(card.folder)}/mem_info_gtt_used, …vram_used)"
    if used <= DESKTOP and sum(large.values()) <= DESKTOP:
        return Finding("ok", saw)
    if not large:
        fix = Fix("list them as root", ("sudo strixft doctor --no-torch",))
        return Finding("warn", f"{saw}: by processes that only root can see", fix)
    largest, stops = [], []
    for pid in sorted(large, key=lambda pid: -large[pid])[:5]:
        name = view.read(f"/proc/{pid}/comm") or "?"
        largest.append(f"{name} (pid {pid}) {format_gib(large[pid])}")
        known = (stop for start, stop in STOP.items() if name.startswith(start))
        stops.append(next(known, f"kill {pid}"))
    fix = Fix("stop them before training", tuple(dict.fromkeys(stops)))
    return Finding("warn", f"{saw}: {', '.join(largest)}", fix)
