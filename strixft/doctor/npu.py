"""IOMMU and NPU: the one hides the other, and a run needs neither."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from strixft.doctor.distro import fix_kernel_arguments
from strixft.doctor.finding import Finding, Fix
from strixft.doctor.view import HostView

LEMONADE = "lemonade-sdk/lemonade: docs/flm_npu_linux.html (vendor)"

NPU_DEVICE = "0x17f0"
"""PCI device of XDNA 2 in Strix and Strix Halo."""

LEAST_FIRMWARE = (1, 1, 0, 0)

ACCEL = "/dev/accel/accel0"

DOC = "docs/npu.md"


def _iommu_off(view: HostView) -> bool:
    arguments = view.kernel_arguments
    return "off" in (arguments.get("amd_iommu"), arguments.get("iommu"))


def check_iommu(view: HostView) -> Iterator[Finding]:
    """What the IOMMU costs, and what its absence hides."""
    if view.strix_halo is None or view.is_wsl:
        return
    cost = "kyuz0/amd-strix-halo-toolboxes#66; lhl/strix-halo-testing: hardware-test (measured)"
    if not _iommu_off(view):
        mode = view.kernel_arguments.get("iommu") or "default"
        yield Finding(
            status="ok",
            saw=f"IOMMU on, mode {mode} (/proc/cmdline)",
            why="the NPU needs it; amd_iommu=off reads memory about 6 % faster and generates up to"
            " 12 % faster in llama.cpp",
            source=f"{cost}; {LEMONADE}",
        )
        return
    yield Finding(
        status="warn",
        saw="the IOMMU is off (/proc/cmdline)",
        why="Linux has no NPU then, so it cannot judge answers while the GPU trains, and no device"
        " is kept out of memory; it frees no memory for the NPU, as some guides say",
        fix=fix_kernel_arguments(
            view,
            "turn it on again; or keep it off, if you want the 5 to 12 % more than the NPU",
            add="iommu=pt",
            remove=("amd_iommu", "iommu"),
        ),
        source=f"{LEMONADE}; antirez/ds4 PR #871; {cost}",
    )


def _has_npu(view: HostView) -> bool:
    ids = [path.parent for path in view.glob("/sys/bus/pci/devices/*/device")]
    return any(
        view.read(folder / "device") == NPU_DEVICE and view.read(folder / "vendor") == "0x1022"
        for folder in ids
    )


def firmware_version(view: HostView) -> tuple[int, ...] | None:
    """Firmware of the NPU, as its driver says."""
    for path in view.glob("/sys/bus/pci/drivers/amdxdna/*/fw_version"):
        numbers = re.findall(r"\d+", view.read(path) or "")
        if numbers:
            return tuple(int(number) for number in numbers)
    return None


def _memlock_limited(view: HostView) -> bool:
    text = view.read("/proc/self/limits") or ""
    found = re.search(r"Max locked memory\s+(\S+)", text)
    return found is not None and found[1] != "unlimited"


def check_npu(view: HostView) -> Iterator[Finding]:
    """The NPU as a judge beside training; a run does not need it."""
    if view.strix_halo is None or _iommu_off(view) or view.is_wsl:
        return
    if not view.exists(ACCEL):
        yield Finding(
            status="ok",
            saw=f"no {ACCEL}; NPU on the PCI bus: {'yes' if _has_npu(view) else 'no'}",
            why=f"training does not use it; as a judge it needs amdxdna of kernel 7.0 or its DKMS"
            f" package: {DOC}",
            source=LEMONADE,
        )
        return
    wrong = list(_npu_faults(view))
    version = firmware_version(view)
    shown = ".".join(map(str, version)) if version else "unknown"
    yield from wrong or [
        Finding(
            status="ok",
            saw=f"{ACCEL}, firmware {shown}",
            why="ready for FastFlowLM; crashes were reported with ROCm at work beside it"
            " (amd/xdna-driver#1605), so a judge's failure must not end a run",
            source=LEMONADE,
        )
    ]


def _npu_faults(view: HostView) -> Iterator[Finding]:
    version = firmware_version(view)
    if version is not None and version < LEAST_FIRMWARE:
        yield Finding(
            status="warn",
            saw=f"NPU firmware {'.'.join(map(str, version))} (fw_version of amdxdna)",
            why="FastFlowLM needs 1.1.0.0",
            fix=Fix(f"install newer NPU firmware with linux-firmware: {DOC}", ("flm validate",)),
            source=LEMONADE,
        )
    if not view.can_open(view.path(ACCEL)):
        yield Finding(
            status="warn",
            saw=f"{view.user.name} may not open {ACCEL}",
            why="FastFlowLM cannot use the NPU",
            fix=Fix(
                "join the group of the device",
                (f"sudo usermod -aG render {shlex.quote(view.user.name)}",),
                "log in again",
            ),
            source=LEMONADE,
        )
    if _memlock_limited(view):
        line = "@render - memlock unlimited"
        yield Finding(
            status="warn",
            saw="locked memory is limited (/proc/self/limits)",
            why="the NPU's buffers are locked pages; models do not load",
            fix=Fix(
                "lift the limit for the group",
                (f"echo '{line}' | sudo tee /etc/security/limits.d/90-npu.conf",),
                "log in again",
            ),
            source=LEMONADE,
        )
