"""Checks of IOMMU and NPU: the one hides the other, and a run needs neither."""

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


def check_iommu(view: HostView) -> Finding:
    """Check the IOMMU, which costs some speed and without which there is no NPU."""
    cost = "kyuz0/amd-strix-halo-toolboxes#66; lhl/strix-halo-testing: hardware-test (measured)"
    if not _iommu_off(view):
        mode = view.kernel_arguments.get("iommu") or "default"
        why = (
            "the NPU needs it; amd_iommu=off reads memory about 6 % faster and generates up to 12 %"
            " faster in llama.cpp"
        )
        saw = f"IOMMU on, mode {mode} (/proc/cmdline)"
        return Finding("ok", saw, why, f"{cost}; {LEMONADE}")
    return Finding(
        "warn",
        "the IOMMU is off (/proc/cmdline)",
        "Linux then has no NPU, so the NPU cannot judge answers while the GPU trains, and every"
        " device can reach all memory; turning it off does not free memory for the NPU, as some"
        " guides say",
        f"{LEMONADE}; antirez/ds4 PR #871; {cost}",
        fix_kernel_arguments(
            view,
            "turn it on again; or keep it off if you prefer the 5 to 12 % to the NPU",
            add="iommu=pt",
            remove=("amd_iommu", "iommu"),
        ),
    )


def firmware_version(view: HostView) -> tuple[int, ...] | None:
    """Return the NPU's firmware version, as its driver reports it."""
    for path in view.glob("/sys/bus/pci/drivers/amdxdna/*/fw_version"):
        numbers = re.findall(r"\d+", view.read(path) or "")
        if numbers:
            return tuple(int(number) for number in numbers)
    return None


def check_npu(view: HostView) -> Iterator[Finding]:
    """Check the NPU as a judge beside training; a run does not need it."""
    if _iommu_off(view):
        return
    if not view.exists(ACCEL):
        paths = view.glob("/sys/bus/pci/devices/*/device")
        ids = {(view.read(path), view.read(path.with_name("vendor"))) for path in paths}
        on_bus = "yes" if (NPU_DEVICE, "0x1022") in ids else "no"
        why = (
            "training does not use it; as a judge it needs amdxdna of kernel 7.0 or its DKMS"
            f" package: {DOC}"
        )
        yield Finding("ok", f"no {ACCEL}; NPU on the PCI bus: {on_bus}", why, LEMONADE)
        return
    version = firmware_version(view)
    shown = ".".join(map(str, version)) if version else "unknown"
    limit = re.search(r"Max locked memory\s+(\S+)", view.read("/proc/self/limits") or "")
    old = version is not None and version < LEAST_FIRMWARE
    closed = not view.can_open(view.path(ACCEL))
    limited = limit is not None and limit[1] != "unlimited"
    if old:
        saw = f"NPU firmware {shown} (fw_version of amdxdna)"
        fix = Fix(f"install newer NPU firmware with linux-firmware: {DOC}", ("flm validate",))
        yield Finding("warn", saw, "FastFlowLM needs 1.1.0.0", LEMONADE, fix)
    if closed:
        saw, command = f"{view.user.name} may not open {ACCEL}", "sudo usermod -aG render"
        commands = (f"{command} {shlex.quote(view.user.name)}",)
        fix = Fix("join the group of the device", commands, "log in again")
        yield Finding("warn", saw, "FastFlowLM cannot use the NPU", LEMONADE, fix)
    if limited:
        file = "/etc/security/limits.d/90-npu.conf"
        command = f"echo '@render - memlock unlimited' | sudo tee {file}"
        fix = Fix("lift the limit for the group", (command,), "log in again")
        why = "the NPU's buffers are locked pages; models do not load"
        saw = "locked memory is limited (/proc/self/limits)"
        yield Finding("warn", saw, why, LEMONADE, fix)
    if not (old or closed or limited):
        why = (
            "ready for FastFlowLM; crashes were reported with ROCm busy beside it"
            " (amd/xdna-driver#1605), so a judge's failure must not end a run"
        )
        yield Finding("ok", f"{ACCEL}, firmware {shown}", why, LEMONADE)
