"""How much memory the GPU may use: carve-out, TTM limit, deprecated parameters."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from strixft.doctor.board import bios_path
from strixft.doctor.distro import fix_kernel_arguments, rebuild_initramfs
from strixft.doctor.finding import Finding, Fix
from strixft.doctor.kernel import AMD_DOC
from strixft.doctor.view import HostView, plausible
from strixft.support.units import GIB, format_gib

PAGE = 4096

RESERVE_GIB = 16
"""What the host keeps; the recipe's `memory.reserve_gib`."""

SMALL_CARVE_OUT = 2 * GIB

LEAST_SHARE = 0.75
"""A limit below this share of RAM is the default of about half, or nearly so."""

LEFT_FOR_HOST = 4 * GIB
"""A limit that leaves less than this is no limit."""


def _reserve_gib(view: HostView) -> float:
    return view.recipe.memory.reserve_gib if view.recipe else RESERVE_GIB


def recommended_gtt_gib(memory_total: int, reserve_gib: float) -> int:
    """RAM less the reserve in whole GiB, and never under half of RAM.

    >>> recommended_gtt_gib(125 * GIB, 16), recommended_gtt_gib(30 * GIB, 16)
    (109, 15)
    """
    total = round(memory_total / GIB)
    return max(int(total - reserve_gib), total // 2)


def _limit_arguments(view: HostView) -> str:
    """The kernel argument that gives the recommended limit, with the module's name here."""
    gib = recommended_gtt_gib(view.memory_total or 0, _reserve_gib(view))
    module = "amdttm" if view.exists("/sys/module/amdttm") else "ttm"
    return f"{module}.pages_limit={gib * GIB // PAGE}"


def _old_parameter(view: HostView) -> tuple[str, ...]:
    return tuple(name for name in ("amdgpu.gttsize",) if name in view.kernel_arguments)


def check_carve_out(view: HostView) -> Iterator[Finding]:
    """A large carve-out is memory that the host loses and the GPU does not need."""
    card = view.strix_halo
    if card is None:
        return
    where = f"{view.shown(card.folder)}/mem_info_vram_total"
    vram = plausible(card.vram_total)
    why = (
        "the carve-out only shrinks what the host can use: with GTT larger than VRAM the driver"
        " places device memory in GTT"
    )
    source = f"{AMD_DOC} (vendor); torvalds/linux@759e764"
    if vram is None:
        yield Finding(
            status="unknown",
            saw=f"{where} cannot be read, or holds no possible number: {card.vram_total}",
            why=why,
            fix=Fix("read what the driver says", ("sudo dmesg | grep -i 'amdgpu.*VRAM'",)),
            source=source,
        )
    elif vram <= SMALL_CARVE_OUT:
        yield Finding(status="ok", saw=f"{format_gib(vram)} ({where})", why=why, source=source)
    else:
        yield Finding(
            status="warn",
            saw=f"{format_gib(vram)} are carved out for VRAM ({where})",
            why=why,
            fix=Fix(f"set it to 0.5 GB in the BIOS: {bios_path(view)}", (), "reboot"),
            source=source,
        )


def check_gtt(view: HostView) -> Iterator[Finding]:
    """What the kernel lets the GPU map, against RAM."""
    card, total = view.strix_halo, plausible(view.memory_total)
    if card is None:
        return
    gtt = plausible(card.gtt_total)
    where = f"{view.shown(card.folder)}/mem_info_gtt_total"
    if gtt is None or not total:
        yield Finding(
            status="unknown",
            saw=f"{where}: {card.gtt_total}; MemTotal: {view.memory_total}",
            why="without both, nobody knows what a run may use",
            fix=Fix("read both by hand", (f"cat {where}", "grep MemTotal /proc/meminfo")),
            source=AMD_DOC,
        )
        return
    saw = f"{format_gib(gtt)} of {format_gib(total)} RAM ({where})"
    if gtt < LEAST_SHARE * total and (card.vram_total or 0) < gtt:
        yield _too_low(view, saw, total)
    elif gtt > total - LEFT_FOR_HOST:
        yield _no_limit(view, saw)
    else:
        why = "the GPU may map this much, and the kernel refuses more"
        yield Finding(status="ok", saw=saw, why=why, source=AMD_DOC)


def module_option(view: HostView, option: str) -> Path | None:
    """File of `/etc/modprobe.d` that sets an option, such as `pages_limit`."""
    for path in view.glob("/etc/modprobe.d/*.conf"):
        if re.search(rf"^options\s.*\b{option}=", view.read(path) or "", re.MULTILINE):
            return path
    return None


def _set_limit(view: HostView, say: str) -> Fix:
    """The limit where it is set now (AMD's `amd-ttm` writes a file), else on the command line."""
    arguments = _limit_arguments(view)
    path = module_option(view, "pages_limit")
    if path is None or _pages_limit(view):
        return fix_kernel_arguments(view, say, add=arguments, remove=_old_parameter(view))
    edit = rf"s/\b(pages_limit=)[0-9]+/\1{arguments.partition('=')[2]}/"
    command = f"sudo sed -i -E '{edit}' {shlex.quote(view.shown(path))}"
    return Fix(say, (command, *rebuild_initramfs(view)), "reboot")


def _too_low(view: HostView, saw: str, total: int) -> Finding:
    gib = recommended_gtt_gib(total, _reserve_gib(view))
    return Finding(
        status="warn",
        saw=f"the GPU may map {saw}",
        why="the default is about half of RAM: larger runs stop for want of memory that is there",
        fix=_set_limit(view, f"raise the limit to {gib} GiB"),
        source=f"{AMD_DOC} (vendor); antirez/ds4 PR #871 (measured: pages × 4096 = GTT)",
    )


def _no_limit(view: HostView, saw: str) -> Finding:
    return Finding(
        status="warn",
        saw=f"the GPU may map {saw}",
        why="a limit of all of RAM leaves the host nothing: an over-commit freezes the machine"
        " instead of raising an error",
        fix=_set_limit(view, "keep some for the host"),
        source="h34v3nzc0dex/strix-halo-llm-finetune-guide: README.md; ROCm/ROCm#6370 (measured)",
    )


def check_memory_parameters(view: HostView) -> Iterator[Finding]:
    """Parameters that are deprecated, or that belong to another driver."""
    if view.strix_halo is None:
        return
    wrong = [*_deprecated(view), *_foreign(view)]
    yield from wrong or [
        Finding(
            status="ok",
            saw="no deprecated memory parameter (/proc/cmdline)",
            why="only pages_limit sets the limit",
            source="https://docs.kernel.org/gpu/amdgpu/module-parameters.html",
        )
    ]


def _deprecated(view: HostView) -> Iterator[Finding]:
    value = view.read_int("/sys/module/amdgpu/parameters/gttsize")
    given = view.kernel_arguments.get("amdgpu.gttsize")
    if given is None and (value is None or value == -1):
        return
    path = module_option(view, "gttsize")
    where = view.shown(path) if path else "/proc/cmdline"
    yield Finding(
        status="warn",
        saw=f"amdgpu.gttsize={given or value} MiB ({where})",
        why="the kernel calls gttsize deprecated and will remove it; two limits that differ hide"
        " which one counts",
        fix=_without_gttsize(view, path if given is None else None),
        source="https://docs.kernel.org/gpu/amdgpu/module-parameters.html",
    )


def _without_gttsize(view: HostView, path: Path | None) -> Fix:
    keep = "" if _pages_limit(view) else _limit_arguments(view)
    say = "set the limit by ttm alone"
    if path is None:
        return fix_kernel_arguments(view, say, add=keep, remove=("amdgpu.gttsize",))
    command = rf"sudo sed -i -E 's/ ?\bgttsize=[0-9]+//' {shlex.quote(view.shown(path))}"
    limit = fix_kernel_arguments(view, say, add=keep).commands if keep else ()
    return Fix(say, (command, *rebuild_initramfs(view), *limit), "reboot")


def _pages_limit(view: HostView) -> str | None:
    arguments = view.kernel_arguments
    return arguments.get("ttm.pages_limit") or arguments.get("amdttm.pages_limit")


def _foreign(view: HostView) -> Iterator[Finding]:
    """`amdttm.*` with the kernel's own driver, or `ttm.*` with AMD's."""
    out_of_tree = view.exists("/sys/module/amdttm")
    wrong = "ttm.pages_limit" if out_of_tree else "amdttm.pages_limit"
    if wrong not in view.kernel_arguments:
        return
    driver = "AMD's (amdgpu-dkms)" if out_of_tree else "the kernel's own"
    yield Finding(
        status="warn",
        saw=f"{wrong} in /proc/cmdline, and the driver is {driver} (/sys/module)",
        why="the name belongs to the other driver, so the limit is not set",
        fix=fix_kernel_arguments(
            view, "use this driver's name", add=_limit_arguments(view), remove=(wrong,)
        ),
        source="ROCm/ROCm#5562, ROCm/ROCm#5595",
    )
