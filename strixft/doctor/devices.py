"""Checks of GPU and NPU, their drivers and access to them, and the machine: board and power."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from strixft.catalog.hosts import AMD_VENDOR
from strixft.catalog.target_kernels import recipe_kernels
from strixft.doctor.finding import Finding, Fix, check
from strixft.doctor.host import NVIDIA_VENDOR, HostView, fix_kernel_arguments

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


@check("gpu", source="/sys/class/drm, /sys/bus/pci/devices")
def gpu(view: HostView) -> Finding | None:
    """Name the GPU."""
    if view.strix_halo is not None:
        saw = f"Strix Halo, gfx1151 (PCI 1002:1586, {view.shown(view.card.folder)})"
        return Finding("ok", saw, why="the machine this product is for")
    if AMD_VENDOR in view.vendors:
        why = "kernel floor, TTM limit and wheel index are checked for gfx1151 only"
        return Finding("ok", "an AMD GPU that is not a Strix Halo", why=why)
    if NVIDIA_VENDOR in view.vendors:
        return Finding("ok", "an NVIDIA GPU", why="everything trains on CUDA too")
    if view.is_wsl:
        return None
    why = "training runs on the CPU: correct, but slow; models up to about 1B"
    fix = Fix("stay with small models and the CPU build of torch", ("make setup TORCH=cpu",))
    return Finding("warn", "neither an AMD nor an NVIDIA GPU", fix, why)


@check(
    "several-gpus",
    why="torch takes the first GPU it counts, and plans read one card's memory",
    source=GPU_ISOLATION,
    strix_halo=True,
)
def several_gpus(view: HostView) -> Finding | None:
    """Check that the GPU to train on is chosen where there are several."""
    if len(view.amd_cards) + (NVIDIA_VENDOR in view.vendors) < 2:
        return None
    nodes = view.glob("/sys/class/kfd/kfd/topology/nodes/*/properties")
    nodes.sort(key=lambda path: int(path.parent.name) if path.parent.name.isdigit() else 0)
    found = [re.search(r"gfx_target_version (\d+)", view.read(path) or "") for path in nodes]
    targets = [match[1] for match in found if match and match[1] != "0"]  # in HIP's order
    chosen = view.environ.get("HIP_VISIBLE_DEVICES") or view.environ.get("ROCR_VISIBLE_DEVICES")
    index = targets.index(GFX1151) if GFX1151 in targets else 0
    external = any(view.read(card.folder / "removable") == "removable" for card in view.amd_cards)
    other = "an external GPU" if external else "a second GPU"
    saw = f"{other} beside the Strix Halo; HIP counts {len(targets)} (/sys/class/kfd)"
    saw += f"; HIP_VISIBLE_DEVICES={chosen}" if chosen else ""
    commands = (f"export HIP_VISIBLE_DEVICES={index}",)
    fix = Fix("choose the GPU that trains, in ~/.profile", commands, "open a new terminal")
    return Finding("ok" if chosen else "warn", saw, fix)


@check("kernels", source="docs/target-kernels.md (compiled for gfx1151, not run)", strix_halo=True)
def kernels(view: HostView) -> Finding:
    """Name the recipes whose layers do not all compile for gfx1151."""
    rows = recipe_kernels().values()
    failing = [row.recipe for row in rows if row.failing]
    saw = f"layers of {len(rows)} recipes were compiled for gfx1151 beforehand"
    if not failing:
        why = "a kernel that the compiler refuses would stop the first update"
        return Finding("ok", f"{saw}: no kernel fails", why=why)
    return Finding(
        "warn",
        f"{saw}: kernels of {', '.join(failing)} fail",
        Fix("leave train.compile at auto: plans of these do not compile their layers"),
        "their training is slower than it could be",
    )


@check("driver", outside=("wsl",))
def driver(view: HostView) -> Finding | None:
    """Check for amdgpu with its compute part, or for NVIDIA's driver."""
    if view.strix_halo is not None:
        return _check_amdgpu(view)
    return _check_nvidia(view) if NVIDIA_VENDOR in view.vendors else None


def _check_amdgpu(view: HostView) -> Finding:
    why = "ROCm reaches the GPU through /dev/kfd, which amdgpu creates"
    arguments = view.kernel_arguments
    if view.exists("/dev/kfd"):
        return Finding("ok", "/dev/kfd", why=why, source=ROCM_INSTALL)
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
    return Finding("fail", saw, fix, why, ROCM_INSTALL)


def _check_nvidia(view: HostView) -> Finding:
    source, why = "/proc/driver/nvidia/version", "CUDA needs NVIDIA's kernel driver"
    version = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", view.read(source) or "")
    if version:
        return Finding("ok", f"NVIDIA driver {version[0]}", why=why, source=source)
    family = view.family
    commands = (f"{family.install} {family.nvidia_driver}",) if family.nvidia_driver else ()
    fix = Fix("install NVIDIA's driver", commands, "reboot")
    if view.is_container:
        fix = Fix("start the container with --gpus all (docker) or --device nvidia.com/gpu=all")
    return Finding("fail", "an NVIDIA GPU without its driver", fix, why, source)


@check(
    "access",
    why="torch sees no GPU if this user may not open its devices",
    source=ROCM_INSTALL,
    strix_halo=True,
)
def access(view: HostView) -> Finding | None:
    """Check that this user may open the devices."""
    if not view.exists("/dev/kfd"):
        return None
    nodes = [view.path("/dev/kfd"), *view.glob("/dev/dri/renderD*")]
    closed = [view.shown(path) for path in nodes if not view.can_open(path)]
    if not closed and len(nodes) > 1:
        return Finding("ok", f"{' '.join(map(view.shown, nodes))} can be opened")
    user, groups = view.user.name, view.user.groups
    names = " ".join(closed) or "/dev/dri/renderD*"
    saw = f"{user} may not open {names} (groups: {' '.join(sorted(groups))})"
    command = f"sudo usermod -aG render,video {shlex.quote(user)}"
    fix = Fix("join the groups of the GPU's devices", (command,), "log in again")
    if view.is_container:
        fix = RESTART_CONTAINER
    elif {"render", "video"} <= groups:
        rule = 'SUBSYSTEM=="kfd", GROUP="render", MODE="0666"'
        commands = (
            f"echo '{rule}' | sudo tee /etc/udev/rules.d/70-kfd.rules",
            "sudo udevadm control --reload && sudo udevadm trigger",
        )
        fix = Fix("the groups are right, but the mode of the devices is wrong", commands)
    elif view.family.name == "nixos":
        line = f'users.users.{user}.extraGroups = [ "render" "video" ];'
        switch = ("sudo nixos-rebuild switch",)
        fix = Fix(f"in configuration.nix {line}", switch, "log in again")
    return Finding("fail", saw, fix)


LEMONADE = "lemonade-sdk/lemonade: docs/flm_npu_linux.html (vendor)"

NPU_DEVICE = "0x17f0"
"""PCI device of XDNA 2 in Strix and Strix Halo."""

LEAST_NPU_FIRMWARE = (1, 1, 0, 0)

ACCEL = "/dev/accel/accel0"

NPU_GUIDE = "docs/npu.md"


def _iommu_off(view: HostView) -> bool:
    return "off" in map(view.kernel_arguments.get, ("amd_iommu", "iommu"))


@check("iommu", strix_halo=True, outside=("wsl",))
def iommu(view: HostView) -> Finding:
    """Check the IOMMU, which costs some speed and without which there is no NPU."""
    cost = "kyuz0/amd-strix-halo-toolboxes#66; lhl/strix-halo-testing: hardware-test (measured)"
    if not _iommu_off(view):
        mode = view.kernel_arguments.get("iommu") or "default"
        why = (
            "the NPU needs it; amd_iommu=off reads memory about 6 % faster and generates up to 12 %"
            " faster in llama.cpp"
        )
        saw = f"IOMMU on, mode {mode} (/proc/cmdline)"
        return Finding("ok", saw, why=why, source=f"{cost}; {LEMONADE}")
    say = "turn it on again; or keep it off if you prefer the 5 to 12 % to the NPU"
    return Finding(
        "warn",
        "the IOMMU is off (/proc/cmdline)",
        fix_kernel_arguments(view, say, add="iommu=pt", remove=("amd_iommu", "iommu")),
        "Linux then has no NPU, so the NPU cannot judge answers while the GPU trains, and every"
        " device can reach all memory; turning it off does not free memory for the NPU, as some"
        " guides say",
        f"{LEMONADE}; antirez/ds4 PR #871; {cost}",
    )


def npu_firmware(view: HostView) -> tuple[int, ...]:
    """Return the NPU's firmware version, as its driver reports it; empty if it does not."""
    paths = view.glob("/sys/bus/pci/drivers/amdxdna/*/fw_version")
    found = (re.findall(r"\d+", view.read(path) or "") for path in paths)
    return tuple(map(int, next(filter(None, found), ())))


@check("npu", source=LEMONADE, strix_halo=True, outside=("wsl",))
def npu(view: HostView) -> Iterator[Finding]:
    """Check the NPU as a judge beside training; a run does not need it."""
    if _iommu_off(view):
        return
    if not view.exists(ACCEL):
        paths = view.glob("/sys/bus/pci/devices/*/device")
        ids = {(view.read(path), view.read(path.with_name("vendor"))) for path in paths}
        on_bus = "yes" if (NPU_DEVICE, "0x1022") in ids else "no"
        why = (
            "training does not use it; as a judge it needs amdxdna of kernel 7.0 or its DKMS"
            f" package: {NPU_GUIDE}"
        )
        yield Finding("ok", f"no {ACCEL}; NPU on the PCI bus: {on_bus}", why=why)
        return
    version = npu_firmware(view)
    shown = ".".join(map(str, version)) or "unknown"
    wrong = []
    if version and version < LEAST_NPU_FIRMWARE:
        say = f"install newer NPU firmware with linux-firmware: {NPU_GUIDE}"
        saw, why = f"NPU firmware {shown} (fw_version of amdxdna)", "FastFlowLM needs 1.1.0.0"
        wrong.append(Finding("warn", saw, Fix(say, ("flm validate",)), why))
    if not view.can_open(view.path(ACCEL)):
        saw, command = f"{view.user.name} may not open {ACCEL}", "sudo usermod -aG render"
        commands = (f"{command} {shlex.quote(view.user.name)}",)
        fix = Fix("join the group of the device", commands, "log in again")
        wrong.append(Finding("warn", saw, fix, "FastFlowLM cannot use the NPU"))
    limit = re.search(r"Max locked memory\s+(\S+)", view.read("/proc/self/limits") or "")
    if limit and limit[1] != "unlimited":
        file = "/etc/security/limits.d/90-npu.conf"
        command = f"echo '@render - memlock unlimited' | sudo tee {file}"
        fix = Fix("lift the limit for the group", (command,), "log in again")
        why = "the NPU's buffers are locked pages; models do not load"
        wrong.append(Finding("warn", "locked memory is limited (/proc/self/limits)", fix, why))
    ready = (
        "ready for FastFlowLM; crashes were reported with ROCm busy beside it"
        " (amd/xdna-driver#1605), so a judge's failure must not end a run"
    )
    yield from wrong or [Finding("ok", f"{ACCEL}, firmware {shown}", why=ready)]


DMI = "/sys/class/dmi/id"

HOMELAB = "deseven/strixhalo-homelab"

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


def _find_board(view: HostView) -> Board:
    """The row of `BOARDS` for this machine, or a board of which only the name is known."""
    names = ("sys_vendor", "product_name", "board_vendor", "board_name")
    texts = [text for name in names if (text := view.read(f"{DMI}/{name}"))]
    text = " ".join(texts).lower()
    known = (board for board in BOARDS if any(word in text for word in board.words))
    name = " ".join(dict.fromkeys(texts)) or "unknown"
    other = Board(name=name, words=(), bios=ANY_BIOS, power="not known here", source=DMI)
    return next(known, other)


def bios_path(view: HostView) -> str:
    """Return the place of the carve-out in this machine's setup, as far as it is known."""
    return _find_board(view).bios


@check("board", strix_halo=True)
def board(view: HostView) -> Finding:
    """Name the machine."""
    row = _find_board(view)
    saw = f"{row.name}, BIOS {view.read(f'{DMI}/bios_version') or 'unknown'} ({DMI})"
    return Finding("ok", saw, why=f"carve-out: {row.bios}; power: {row.power}", source=row.source)


@check(
    "power",
    source=f"{HOMELAB}: Guides/Power_Modes_and_Performance.md (measured)",
    strix_halo=True,
)
def power(view: HostView) -> Iterator[Finding]:
    """Check for a profile or a cap that slows every run down."""
    file = "/sys/firmware/acpi/platform_profile"
    profile = view.read(file)
    if profile in ("low-power", "quiet", "cool"):
        why = (
            "it caps the socket's power: 120 W do 26.5 % more work than 55 W on the CPU, and the"
            " GPU shares the budget"
        )
        fix = Fix("use the fastest profile for training", (f"echo performance | sudo tee {file}",))
        yield Finding("warn", f"platform profile {profile} ({file})", fix, why)
    else:
        saw = f"platform profile {profile or 'not offered by this firmware'}"
        yield Finding("ok", saw, why="it does not cap the power")
    for cap in sorted(view.card.folder.glob("hwmon/hwmon*/power1_cap")):
        now, default = view.read_int(cap), view.read_int(cap.with_name("power1_cap_default"))
        if now is not None and default is not None and 0 < now < default:
            where = view.shown(cap)
            yield Finding(
                "warn",
                f"GPU capped at {now // 10**6} W of {default // 10**6} W ({where})",
                Fix("restore the default", (f"echo {default} | sudo tee {where}",)),
                "training slows down with the cap",
                "https://docs.kernel.org/gpu/amdgpu/thermal.html",
            )
