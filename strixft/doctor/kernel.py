"""Platform, distribution, kernel and firmware."""

from __future__ import annotations

import re
from collections.abc import Iterator

from strixft.doctor.distro import Distribution, read_distribution, upgrade
from strixft.doctor.finding import Finding, Fix
from strixft.doctor.view import HostView

AMD_DOC = (
    "https://rocm.docs.amd.com/en/docs-7.14.0/_sources/reference/system-optimization/rdna3-5.rst"
)

KYUZ0 = "kyuz0/amd-strix-halo-toolboxes: README.md"


FLOOR = (6, 18, 4)
"""First mainline kernel with both KFD fixes (commits 7f26af7, 7445db6)."""

NOBLE_GENERIC = (6, 17, 0, 19)
"""Ubuntu 24.04's HWE kernel 6.17.0-19.19~24.04.2 has them as patches."""

NOBLE_OEM = (6, 14, 0, 1018)

BAD_FIRMWARE = "20251125"

SUSPECT_KERNEL, SUSPECT_FIRMWARE = (7, 2), "20260810"
"""A pair; the same user space does not fault with older firmware."""

WHY_FLOOR = (
    "without two fixes of the compute driver, torch.cuda.synchronize() hangs with the GPU at 100 %,"
    " or training ends in HSA page faults"
)


def kernel_version(release: str) -> tuple[int, ...] | None:
    """Numbers of a kernel release: three, and Ubuntu's build number if there is one.

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


def check_platform(view: HostView) -> Iterator[Finding]:
    """Linux on the metal, in a container, or inside Windows."""
    source = "kernel release and marker files"
    if view.is_wsl:
        yield _wsl(view, source)
    else:
        where = "inside a container" if view.is_container else "on the machine itself"
        yield Finding(
            status="ok",
            saw=f"Linux, {view.machine}, {where}",
            why="kernel, memory limits and devices are the host's; packages are the container's"
            if view.is_container
            else "everything can be seen from here",
            source=source,
        )


def _wsl(view: HostView, source: str) -> Finding:
    saw = f"kernel {view.release}: Linux inside Windows (WSL)"
    if view.exists("/usr/lib/wsl/lib/libcuda.so.1"):
        why = "CUDA comes through from Windows"
        return Finding(status="ok", saw=saw, why=why, source=source)
    return Finding(
        status="fail" if view.exists("/dev/dxg") else "warn",
        saw=saw,
        why="there is no /dev/kfd in WSL and Windows keeps half of the memory; what is checked and"
        " fixed here does not reach the GPU from there",
        fix=Fix("install Linux beside Windows or instead of it: Fedora 43, Ubuntu 26.04"),
        source=source,
    )


def check_distribution(view: HostView) -> Iterator[Finding]:
    """Which distribution, since fixes and floors depend on it."""
    distribution = read_distribution(view)
    known = distribution.family != "unknown"
    yield Finding(
        status="ok" if known else "unknown",
        saw=f"{distribution.name} (/etc/os-release)",
        why="fixes below are typed for it"
        if known
        else "fixes below name what to change, not the command for this distribution",
        fix=None
        if known
        else Fix(
            "read the fixes as what to change; check /etc/os-release", ("cat /etc/os-release",)
        ),
        source="/etc/os-release, https://www.freedesktop.org/software/systemd/man/os-release.html",
    )


def _upgrade_kernel(view: HostView, distribution: Distribution) -> Fix:
    if distribution.is_noble:
        packages = "sudo apt update && sudo apt install linux-generic-hwe-24.04"
        return Fix("install the HWE kernel, 6.17.0-19 or newer", (packages,), "reboot")
    if distribution.id == "ubuntu" and distribution.version < "26.04":
        return _next_release("Ubuntu 26.04", "https://documentation.ubuntu.com/release-notes/")
    if distribution.id == "debian":
        return _debian_backports(distribution)
    if distribution.family == "fedora" and distribution.id not in ("fedora", "bazzite", "nobara"):
        return Fix("no kernel of this distribution is new enough: install Fedora 43 or newer")
    return Fix("install kernel 6.18.4 or newer", upgrade(view), "reboot")


def _next_release(name: str, guide: str) -> Fix:
    """A new release of the distribution: a decision, with a backup before it; never a command."""
    return Fix(
        f"no kernel of this release is new enough: go to {name}, by hand and after a backup, as"
        f" {guide} says; then type strixft doctor again"
    )


def _debian_backports(distribution: Distribution) -> Fix:
    if distribution.version.isdigit() and int(distribution.version) < 13:
        return _next_release("Debian 13", "https://www.debian.org/releases/trixie/release-notes/")
    suites = r"/^Suites:/ { /trixie-backports/! s/(trixie-updates)/\1 trixie-backports/ }"
    return Fix(
        "take the kernel and the firmware from Debian's backports",
        (
            f"sudo sed -i -E '{suites}' /etc/apt/sources.list.d/debian.sources",
            "sudo apt update",
            "sudo apt install -t trixie-backports linux-image-amd64 firmware-amd-graphics",
        ),
        "reboot",
    )


def _below_floor(version: tuple[int, ...], release: str, distribution: Distribution) -> bool:
    if version[:3] >= FLOOR:
        return False
    if distribution.is_noble:
        least = NOBLE_OEM if release.endswith("-oem") else NOBLE_GENERIC
        return version < least
    return True


def check_kernel(view: HostView) -> Iterator[Finding]:
    """The kernel against the floor of this distribution, where the GPU is a Strix Halo."""
    distribution = read_distribution(view)
    version = kernel_version(view.release)
    saw = f"{view.release or 'no release'} on {distribution.name} (/proc/sys/kernel/osrelease)"
    if view.is_wsl or view.strix_halo is None:
        return
    if version is None:
        yield Finding(
            status="unknown",
            saw=saw,
            why=WHY_FLOOR,
            fix=Fix("compare with 6.18.4 by hand", ("uname -r",)),
            source=AMD_DOC,
        )
    elif _below_floor(version, view.release, distribution):
        yield Finding(
            status="fail",
            saw=f"{saw}; the floor here is {_floor_text(view.release, distribution)}",
            why=WHY_FLOOR,
            fix=_upgrade_kernel(view, distribution),
            source=AMD_DOC,
        )
    else:
        yield _above_floor(view, version, distribution, saw)


def _floor_text(release: str, distribution: Distribution) -> str:
    if distribution.is_noble:
        return "6.14.0-1018" if release.endswith("-oem") else "6.17.0-19 (HWE)"
    return "6.18.4"


def _above_floor(
    view: HostView, version: tuple[int, ...], distribution: Distribution, saw: str
) -> Finding:
    if distribution.is_noble and version[0] >= 7:
        return Finding(
            status="fail",
            saw=saw,
            why="kernel 7.0 under Ubuntu 24.04 is an unsupported pair: loading weights was about"
            " 300 times slower, with silent hangs",
            fix=_upgrade_kernel(view, distribution),
            source="ROCm/ROCm#6530 (measured)",
        )
    if version[:2] == (6, 19):
        return Finding(
            status="warn",
            saw=saw,
            why="6.19 gets no fixes since 2026-04-22; 7.0.9 trains at the same speed",
            fix=Fix("install a newer kernel", upgrade(view), "reboot"),
            source="h34v3nzc0dex/strix-halo-llm-finetune-guide: README.md (measured)",
        )
    why = f"at or above the floor, {_floor_text(view.release, distribution)}"
    return Finding(status="ok", saw=saw, why=why, source=AMD_DOC)


FIRMWARE_QUERIES = {
    "fedora": ("rpm", "-q", "--qf", "%{VERSION}\\n", "linux-firmware", "amd-gpu-firmware"),
    "debian": (
        "dpkg-query",
        "-W",
        "-f",
        "${Version}\\n",
        "linux-firmware",
        "firmware-amd-graphics",
    ),
    "arch": ("pacman", "-Q", "linux-firmware", "linux-firmware-amdgpu"),
    "suse": ("rpm", "-q", "--qf", "%{VERSION}\\n", "kernel-firmware-amdgpu"),
}


def check_firmware(view: HostView) -> Iterator[Finding]:
    """The release of linux-firmware that breaks ROCm."""
    if view.strix_halo is None or view.is_container or view.is_wsl:
        return
    query = FIRMWARE_QUERIES.get(read_distribution(view).family)
    answer = view.command(query) if query else None
    dates = re.findall(r"20\d{6}", answer or "")
    why = f"linux-firmware {BAD_FIRMWARE} makes ROCm unstable or crash on this GPU"
    source = "kyuz0/amd-strix-halo-toolboxes: docs/troubleshooting-firmware.md (measured)"
    kernel = kernel_version(view.release)
    if SUSPECT_FIRMWARE in dates and kernel and kernel[:2] == SUSPECT_KERNEL:
        yield Finding(
            status="warn",
            saw=f"linux-firmware {SUSPECT_FIRMWARE} with kernel {view.release}",
            why="GPU faults were reported with this pair; with linux-firmware 20260622 they ended",
            fix=Fix(
                "go back to linux-firmware 20260622, or start a kernel 7.0 or 7.1: your"
                " distribution keeps the older packages",
                (),
                "reboot",
            ),
            source="noamsto/nix-amd-ai#105, PR #121 (measured)",
        )
    elif BAD_FIRMWARE in dates:
        yield Finding(
            status="fail",
            saw=f"linux-firmware {BAD_FIRMWARE} ({query[0] if query else ''})",
            why=why,
            fix=_new_firmware(view),
            source=source,
        )
    elif dates:
        yield Finding(status="ok", saw=f"linux-firmware {max(dates)}", why=why, source=source)
    else:
        yield Finding(
            status="unknown",
            saw="the package manager names no dated linux-firmware",
            why=why,
            fix=Fix(
                f"look for a date other than {BAD_FIRMWARE}",
                ("sudo dmesg | grep -i 'amdgpu.*firmware'",),
            ),
            source=source,
        )


def _new_firmware(view: HostView) -> Fix:
    say = "install linux-firmware 20260110 or newer (or go back to 20251111)"
    family = read_distribution(view).family
    commands = {
        "fedora": (
            "sudo dnf upgrade --refresh linux-firmware amd-gpu-firmware",
            "sudo dracut -f --regenerate-all",
        ),
        "debian": (
            "sudo apt update && sudo apt install linux-firmware || sudo apt install"
            " firmware-amd-graphics",
            "sudo update-initramfs -u -k all",
        ),
    }
    return Fix(say, commands.get(family, upgrade(view)), "reboot")
