"""Checks of the GPU, its driver, access to it, and the machine around it: board and power."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from strixft.catalog.hosts import AMD_VENDOR
from strixft.doctor.distro import fix_kernel_arguments, read_distribution
from strixft.doctor.finding import Finding, Fix
from strixft.doctor.view import HostView

NVIDIA_VENDOR = "0x10de"

ROCM_DOCS = "https://rocm.docs.amd.com"

ROCM_INSTALL = f"{ROCM_DOCS}/projects/install-on-linux/en/latest/install/prerequisites.html"

GPU_ISOLATION = f"{ROCM_DOCS}/en/latest/conceptual/gpu-isolation.html"

CONTAINER_FLAGS = (
    "--device /dev/kfd --device /dev/dri --group-add video --group-add render"
    " --security-opt seccomp=unconfined"
)

RESTART_CONTAINER = Fix(
    f"start the container with {CONTAINER_FLAGS}", ("container/toolbox.sh create",)
)

GFX1151 = "110501"
"""The target of a Strix Halo in the kernel's topology of compute nodes."""


def check_gpu(view: HostView) -> Finding | None:
    """Name the GPU."""
    source = "/sys/class/drm, /sys/bus/pci/devices"
    if view.strix_halo is not None:
        saw = f"Strix Halo, gfx1151 (PCI 1002:1586, {view.shown(view.card.folder)})"
        return Finding("ok", saw, "the machine this product is for", source)
    if AMD_VENDOR in view.vendors:
        why = "kernel floor, TTM limit and wheel index are checked for gfx1151 only"
        return Finding("ok", "an AMD GPU that is not a Strix Halo", why, source)
    if NVIDIA_VENDOR in view.vendors:
        return Finding("ok", "an NVIDIA GPU", "everything trains on CUDA too", source)
    if view.is_wsl:
        return None
    why = "training runs on the CPU: correct, but slow; models up to about 1B"
    fix = Fix("stay with small models and the CPU build of torch", ("make setup TORCH=cpu",))
    return Finding("warn", "neither an AMD nor an NVIDIA GPU", why, source, fix)


def check_several_gpus(view: HostView) -> Finding | None:
    """Check that the GPU to train on is chosen where there are several."""
    nodes = view.glob("/sys/class/kfd/kfd/topology/nodes/*/properties")
    nodes.sort(key=lambda path: int(path.parent.name) if path.parent.name.isdigit() else 0)
    found = [re.search(r"gfx_target_version (\d+)", view.read(path) or "") for path in nodes]
    targets = [match[1] for match in found if match and match[1] != "0"]  # in HIP's order
    if len(view.amd_cards) + (NVIDIA_VENDOR in view.vendors) < 2:
        return None
    chosen = view.environ.get("HIP_VISIBLE_DEVICES") or view.environ.get("ROCR_VISIBLE_DEVICES")
    index = targets.index(GFX1151) if GFX1151 in targets else 0
    external = any(view.read(card.folder / "removable") == "removable" for card in view.amd_cards)
    other = "an external GPU" if external else "a second GPU"
    saw = f"{other} beside the Strix Halo; HIP counts {len(targets)} (/sys/class/kfd)"
    return Finding(
        "ok" if chosen else "warn",
        f"{saw}; HIP_VISIBLE_DEVICES={chosen}" if chosen else saw,
        "torch takes the first GPU it counts, and plans read one card's memory",
        GPU_ISOLATION,
        Fix(
            "choose the GPU that trains, in ~/.profile",
            (f"export HIP_VISIBLE_DEVICES={index}",),
            "open a new terminal",
        ),
    )


def check_driver(view: HostView) -> Finding | None:
    """Check for amdgpu with its compute part, or for NVIDIA's driver."""
    if view.strix_halo is not None:
        return _check_amdgpu(view)
    return _check_nvidia(view) if NVIDIA_VENDOR in view.vendors else None


def _check_amdgpu(view: HostView) -> Finding:
    why = "ROCm reaches the GPU through /dev/kfd, which amdgpu creates"
    arguments = view.kernel_arguments
    if view.exists("/dev/kfd"):
        return Finding("ok", "/dev/kfd", why, ROCM_INSTALL)
    if view.is_container:
        saw, fix = "no /dev/kfd in this container", RESTART_CONTAINER
    elif "nomodeset" in arguments or "amdgpu" in arguments.get("modprobe.blacklist", ""):
        saw = "no /dev/kfd; nomodeset or a blacklist keeps amdgpu from loading (/proc/cmdline)"
        names = ("nomodeset", "modprobe.blacklist")
        fix = fix_kernel_arguments(view, "let the kernel load amdgpu", remove=names)
    elif view.exists("/sys/module/amdgpu"):
        saw = "amdgpu is loaded, /dev/kfd is missing: the compute part did not start"
        fix = Fix("read the driver's messages", ("sudo dmesg | grep -iE 'kfd|amdgpu'",))
    else:
        saw = "no /dev/kfd; amdgpu is not loaded (/sys/module)"
        fix = Fix("load the driver", ("sudo modprobe amdgpu",))
    return Finding("fail", saw, why, ROCM_INSTALL, fix)


NVIDIA_PACKAGES = {
    "debian": "nvidia-driver",
    "fedora": "akmod-nvidia",
    "arch": "nvidia-open",
    "suse": "nvidia-open",
}


def _check_nvidia(view: HostView) -> Finding:
    source, why = "/proc/driver/nvidia/version", "CUDA needs NVIDIA's kernel driver"
    version = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", view.read(source) or "")
    if version:
        return Finding("ok", f"NVIDIA driver {version[0]}", why, source)
    family = read_distribution(view).family
    package = NVIDIA_PACKAGES.get(family.name)
    commands = (f"{family.install} {package}",) if package else ()
    fix = Fix("install NVIDIA's driver", commands, "reboot")
    if view.is_container:
        fix = Fix("start the container with --gpus all (docker) or --device nvidia.com/gpu=all")
    return Finding("fail", "an NVIDIA GPU without its driver", why, source, fix)


def check_access(view: HostView) -> Finding | None:
    """Check that this user may open the devices."""
    if not view.exists("/dev/kfd"):
        return None
    nodes = [view.path("/dev/kfd"), *view.glob("/dev/dri/renderD*")]
    closed = [view.shown(path) for path in nodes if not view.can_open(path)]
    why = "torch sees no GPU if this user may not open its devices"
    if not closed and len(nodes) > 1:
        names = " ".join(view.shown(path) for path in nodes)
        return Finding("ok", f"{names} can be opened", why, ROCM_INSTALL)
    saw = (
        f"{view.user.name} may not open {' '.join(closed) or '/dev/dri/renderD*'}"
        f" (groups: {' '.join(sorted(view.user.groups))})"
    )
    return Finding("fail", saw, why, ROCM_INSTALL, _grant_access(view))


def _grant_access(view: HostView) -> Fix:
    user = view.user.name
    if view.is_container:
        return RESTART_CONTAINER
    if {"render", "video"} <= view.user.groups:
        rule = 'SUBSYSTEM=="kfd", GROUP="render", MODE="0666"'
        commands = (
            f"echo '{rule}' | sudo tee /etc/udev/rules.d/70-kfd.rules",
            "sudo udevadm control --reload && sudo udevadm trigger",
        )
        return Fix("the groups are right, but the mode of the devices is wrong", commands)
    if read_distribution(view).family.name == "nixos":
        line = f'users.users.{user}.extraGroups = [ "render" "video" ];'
        return Fix(f"in configuration.nix {line}", ("sudo nixos-rebuild switch",), "log in again")
    command = f"sudo usermod -aG render,video {shlex.quote(user)}"
    return Fix("join the groups of the GPU's devices", (command,), "log in again")


DMI = "/sys/class/dmi/id"

HOMELAB = "deseven/strixhalo-homelab"

POWER_GUIDE = f"{HOMELAB}: Guides/Power_Modes_and_Performance.md (measured)"

ANY_BIOS = (
    "look for UMA Frame Buffer Size or iGPU Memory Size, often under Advanced → AMD CBS → NBIO →"
    " GFX Configuration"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """A machine with this chip."""

    name: str
    words: tuple[str, ...]
    """Parts of the DMI fields, in lower case."""
    bios: str
    """Place of the VRAM carve-out in the setup."""
    power: str
    source: str


BOARDS = (
    Board(
        name="Framework Desktop",
        words=("desktop (amd ryzen ai max", "franmfcp"),
        bios="F2 at start → Setup Utility → Advanced → iGPU Memory Configuration: Custom →"
        " iGPU Memory Size: 0.5 GB",
        power="120 W sustained, 140 W peak",
        source="owners' notes on BIOS 03.05 (claimed)",
    ),
    Board(
        name="Minisforum MS-S1 MAX",
        words=("ms-s1 max", "ms-s1max"),
        bios=f"Del at start; {ANY_BIOS}",
        power="modes in the BIOS; its 10G network needs kernel 6.17.11 or 6.18",
        source=f"{HOMELAB}: Hardware/PCs/Minisforum_MS-S1_MAX.md",
    ),
    Board(
        name="Sixunited AXB35 (GMKtec EVO-X2, Bosgame M5, FEVM FA-EX9, NIMO)",
        words=("evo-x2", "axb35", "bosgame m5", "fa-ex9"),
        bios="Del at start → Advanced → GFX Configuration → iGPU Configuration: UMA_SPECIFIED →"
        " UMA Frame buffer Size: 512M",
        power="55, 85 or 120 W by the button, the BIOS or the module ec_su_axb35",
        source=f"{HOMELAB}: Hardware/Boards/Sixunited_AXB35.md",
    ),
    Board(
        name="Beelink GTR9 Pro",
        words=("gtr9",),
        bios="Del at start → AMD CBS → UMA Frame buffer Size: 512M (it comes as 96G)",
        power="120 W; 140 W by AMD CBS → SMU Common Options → System Configuration",
        source="a published decoding of BIOS GTRPRPI1001C (claimed)",
    ),
    Board(
        name="HP Z2 Mini G1a / ZBook Ultra G1a",
        words=("z2 mini g1a", "zbook ultra"),
        bios=f"F10 at start; {ANY_BIOS}",
        power="by the BIOS and platform_profile",
        source="not checked on the machine (claimed)",
    ),
    Board(
        name="ASUS ROG Flow Z13 (2025)",
        words=("flow z13", "gz302"),
        bios=f"F2 at start → Advanced; {ANY_BIOS}",
        power="by platform_profile (asusd)",
        source="not checked on the machine (claimed)",
    ),
)


def _dmi(view: HostView) -> list[str]:
    names = ("sys_vendor", "product_name", "board_vendor", "board_name")
    return [text for name in names if (text := view.read(f"{DMI}/{name}"))]


def find_board(view: HostView) -> Board | None:
    """Return the row of `BOARDS` for this machine, if there is one."""
    text = " ".join(_dmi(view)).lower()
    return next((board for board in BOARDS if any(word in text for word in board.words)), None)


def bios_path(view: HostView) -> str:
    """Return the place of the carve-out in this machine's setup, as far as it is known."""
    board = find_board(view)
    return board.bios if board else ANY_BIOS


def check_board(view: HostView) -> Finding:
    """Name the machine."""
    board = find_board(view)
    name = board.name if board else " ".join(dict.fromkeys(_dmi(view))) or "unknown"
    saw = f"{name}, BIOS {view.read(f'{DMI}/bios_version') or 'unknown'} ({DMI})"
    power = board.power if board else "not known here"
    why = f"carve-out: {bios_path(view)}; power: {power}"
    return Finding("ok", saw, why, board.source if board else DMI)


def check_power(view: HostView) -> Iterator[Finding]:
    """Check for a profile or a cap that slows every run down."""
    file = "/sys/firmware/acpi/platform_profile"
    profile = view.read(file)
    if profile in ("low-power", "quiet", "cool"):
        why = (
            "it caps the socket's power: 120 W do 26.5 % more work than 55 W on the CPU, and the"
            " GPU shares the budget"
        )
        fix = Fix("use the fastest profile for training", (f"echo performance | sudo tee {file}",))
        yield Finding("warn", f"platform profile {profile} ({file})", why, POWER_GUIDE, fix)
    else:
        saw = f"platform profile {profile or 'not offered by this firmware'}"
        yield Finding("ok", saw, "it does not cap the power", POWER_GUIDE)
    for cap in sorted(view.card.folder.glob("hwmon/hwmon*/power1_cap")):
        now, default = view.read_int(cap), view.read_int(cap.with_name("power1_cap_default"))
        if now is not None and default is not None and 0 < now < default:
            where = view.shown(cap)
            yield Finding(
                "warn",
                f"GPU capped at {now // 10**6} W of {default // 10**6} W ({where})",
                "training slows down with the cap",
                "https://docs.kernel.org/gpu/amdgpu/thermal.html",
                Fix("restore the default", (f"echo {default} | sudo tee {where}",)),
            )
