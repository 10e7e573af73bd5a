"""Checks of platform, distribution, kernel and firmware."""

from __future__ import annotations

import re

from strixft.doctor.distro import Distribution, read_distribution, upgrade
from strixft.doctor.finding import Finding, Fix
from strixft.doctor.view import HostView

AMD_DOC = (
    "https://rocm.docs.amd.com/en/docs-7.14.0/_sources/reference/system-optimization/rdna3-5.rst"
)

FINETUNE_GUIDE = "h34v3nzc0dex/strix-halo-llm-finetune-guide: README.md"

FLOOR = (6, 18, 4)
"""First mainline kernel with both KFD fixes (commits 7f26af7, 7445db6)."""

NOBLE_GENERIC, NOBLE_OEM = (6, 17, 0, 19), (6, 14, 0, 1018)
"""Ubuntu 24.04 has the fixes as patches: HWE kernel 6.17.0-19.19~24.04.2, OEM 6.14.0-1018."""

BAD_FIRMWARE = "20251125"

SUSPECT_KERNEL, SUSPECT_FIRMWARE = (7, 2), "20260810"
"""A pair; the same user space does not fault with older firmware."""

WHY_FLOOR = (
    "without two fixes of the compute driver, torch.cuda.synchronize() hangs with the GPU at 100 %,"
    " or training ends in HSA page faults"
)


def kernel_version(release: str) -> tuple[int, ...] | None:
    """Return the three numbers of a kernel release, and Ubuntu's build number if there is one.

    >>> kernel_version("6.17.0-19-generic"), kernel_version("6.18.9-200.fc43.x86_64")
    ((6, 17, 0, 19), (6, 18, 9, 200))
    >>> kernel_version("6.19-rc3"), kernel_version("nonsense")
    ((6, 19, 0), None)
    """
    found = re.match(r"(\d{1,3})\.(\d{1,4})(?:\.(\d{1,6}))?(?:-(\d{1,6})\b)?", release)
    if found is None:
        return None
    major, minor, patch, build = found.groups()
    numbers = (int(major), int(minor), int(patch or 0))
    return (*numbers, int(build)) if build else numbers


def check_platform(view: HostView) -> Finding:
    """Check for Linux on the machine itself, in a container, or inside Windows."""
    source = "kernel release and marker files"
    if view.is_wsl:
        saw = f"kernel {view.release}: Linux inside Windows (WSL)"
        if view.exists("/usr/lib/wsl/lib/libcuda.so.1"):
            return Finding("ok", saw, "CUDA comes through from Windows", source)
        why = (
            "WSL has no /dev/kfd and Windows keeps half of the memory; checks and fixes from here"
            " do not reach the GPU"
        )
        fix = Fix("install Linux beside Windows or instead of it: Fedora 43, Ubuntu 26.04")
        return Finding("fail" if view.exists("/dev/dxg") else "warn", saw, why, source, fix)
    where, why = "on the machine itself", "everything can be seen from here"
    if view.is_container:
        where = "inside a container"
        why = "kernel, memory limits and devices are the host's; packages are the container's"
    return Finding("ok", f"Linux, {view.machine}, {where}", why, source)


def check_distribution(view: HostView) -> Finding:
    """Check that the distribution is known, since fixes and floors depend on it."""
    distribution = read_distribution(view)
    saw = f"{distribution.name} (/etc/os-release)"
    source = "/etc/os-release, https://www.freedesktop.org/software/systemd/man/os-release.html"
    if distribution.family.members:
        return Finding("ok", saw, "the fixes below are commands for it", source)
    why = "the fixes below name the change, not the command for this distribution"
    say = "read the fixes as descriptions; check /etc/os-release"
    return Finding("unknown", saw, why, source, Fix(say, ("cat /etc/os-release",)))


def _next_release(name: str, guide: str) -> Fix:
    """Build the fix that needs a new release: a decision after a backup, never a command."""
    return Fix(
        f"no kernel of this release is new enough: go to {name}, by hand and after a backup, as"
        f" {guide} says; then run strixft doctor again"
    )


def _newer_kernel(view: HostView, distribution: Distribution) -> Fix:
    if distribution.is_noble:
        packages = "sudo apt update && sudo apt install linux-generic-hwe-24.04"
        return Fix("install the HWE kernel, 6.17.0-19 or newer", (packages,), "reboot")
    if distribution.id == "ubuntu" and distribution.version < "26.04":
        return _next_release("Ubuntu 26.04", "https://documentation.ubuntu.com/release-notes/")
    if distribution.id == "debian":
        if distribution.version.isdigit() and int(distribution.version) < 13:
            notes = "https://www.debian.org/releases/trixie/release-notes/"
            return _next_release("Debian 13", notes)
        suites = r"/^Suites:/ { /trixie-backports/! s/(trixie-updates)/\1 trixie-backports/ }"
        commands = (
            f"sudo sed -i -E '{suites}' /etc/apt/sources.list.d/debian.sources",
            "sudo apt update",
            "sudo apt install -t trixie-backports linux-image-amd64 firmware-amd-graphics",
        )
        return Fix("take kernel and firmware from Debian's backports", commands, "reboot")
    has_new_kernels = distribution.id in ("fedora", "bazzite", "nobara")
    if distribution.family.name == "fedora" and not has_new_kernels:
        return Fix("no kernel of this distribution is new enough: install Fedora 43 or newer")
    return Fix("install kernel 6.18.4 or newer", upgrade(view), "reboot")


def check_kernel(view: HostView) -> Finding:
    """Compare the kernel with the floor of this distribution."""
    distribution = read_distribution(view)
    version, is_noble = kernel_version(view.release), distribution.is_noble
    saw = f"{view.release or 'no release'} on {distribution.name} (/proc/sys/kernel/osrelease)"
    if version is None:
        fix = Fix("compare with 6.18.4 by hand", ("uname -r",))
        return Finding("unknown", saw, WHY_FLOOR, AMD_DOC, fix)
    floor, is_below = "6.18.4", version[:3] < FLOOR
    if is_noble:
        is_oem = view.release.endswith("-oem")
        floor = "6.14.0-1018" if is_oem else "6.17.0-19 (HWE)"
        is_below = is_below and version < (NOBLE_OEM if is_oem else NOBLE_GENERIC)
    fix = _newer_kernel(view, distribution)
    if is_below:
        saw = f"{saw}; the floor here is {floor}"
        return Finding("fail", saw, WHY_FLOOR, AMD_DOC, fix)
    if is_noble and version[0] >= 7:
        why = (
            "kernel 7.0 under Ubuntu 24.04 is an unsupported pair: loading weights was about"
            " 300 times slower, with silent hangs"
        )
        return Finding("fail", saw, why, "ROCm/ROCm#6530 (measured)", fix)
    if version[:2] == (6, 19):
        why = "6.19 has had no fixes since 2026-04-22; 7.0.9 trains at the same speed"
        newer = Fix("install a newer kernel", upgrade(view), "reboot")
        return Finding("warn", saw, why, f"{FINETUNE_GUIDE} (measured)", newer)
    return Finding("ok", saw, f"at or above the floor, {floor}", AMD_DOC)


def check_firmware(view: HostView) -> Finding:
    """Check for releases of linux-firmware that break ROCm."""
    query = read_distribution(view).family.firmware_query
    dates = re.findall(r"20\d{6}", (view.command(query) if query else None) or "")
    why = f"linux-firmware {BAD_FIRMWARE} makes ROCm unstable or crash on this GPU"
    source = "kyuz0/amd-strix-halo-toolboxes: docs/troubleshooting-firmware.md (measured)"
    if SUSPECT_FIRMWARE in dates and (kernel_version(view.release) or ())[:2] == SUSPECT_KERNEL:
        return Finding(
            "warn",
            f"linux-firmware {SUSPECT_FIRMWARE} with kernel {view.release}",
            "GPU faults were reported with this pair; with linux-firmware 20260622 they ended",
            "noamsto/nix-amd-ai#105, PR #121 (measured)",
            Fix(
                "go back to linux-firmware 20260622, or start a kernel 7.0 or 7.1: your"
                " distribution keeps the older packages",
                restart="reboot",
            ),
        )
    if BAD_FIRMWARE in dates:
        saw = f"linux-firmware {BAD_FIRMWARE} ({query[0]})"
        return Finding("fail", saw, why, source, _newer_firmware(view))
    if dates:
        return Finding("ok", f"linux-firmware {max(dates)}", why, source)
    saw = "the package manager lists no linux-firmware with a date"
    command = "sudo dmesg | grep -i 'amdgpu.*firmware'"
    fix = Fix(f"look for a date other than {BAD_FIRMWARE}", (command,))
    return Finding("unknown", saw, why, source, fix)


def _newer_firmware(view: HostView) -> Fix:
    family = read_distribution(view).family
    commands = {
        "fedora": (f"{family.upgrade} linux-firmware amd-gpu-firmware", family.initramfs),
        "debian": (
            "sudo apt update && sudo apt install linux-firmware || sudo apt install"
            " firmware-amd-graphics",
            family.initramfs,
        ),
    }.get(family.name, upgrade(view))
    say = "install linux-firmware 20260110 or newer (or go back to 20251111)"
    return Fix(say, commands, "reboot")
