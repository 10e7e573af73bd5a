"""The GPU itself, its driver, and who may open it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from strixft.catalog.hosts import AMD_VENDOR
from strixft.doctor.distro import fix_kernel_arguments, install, read_distribution
from strixft.doctor.finding import Finding, Fix
from strixft.doctor.view import HostView, plausible
from strixft.support.units import GIB, format_gib

NVIDIA_VENDOR = "0x10de"

ROCM_INSTALL = (
    "https://rocm.docs.amd.com/projects/install-on-linux/en/latest/install/prerequisites.html"
)

CONTAINER_FLAGS = (
    "--device /dev/kfd --device /dev/dri --group-add video --group-add render"
    " --security-opt seccomp=unconfined"
)

GFX1151 = "110501"


def check_gpu(view: HostView) -> Iterator[Finding]:
    """Which GPU there is."""
    source = "/sys/class/drm, /sys/bus/pci/devices"
    if view.strix_halo is not None:
        card = view.strix_halo
        saw = f"Strix Halo, gfx1151 (PCI 1002:1586, {view.shown(card.folder)})"
        yield Finding(status="ok", saw=saw, why="the machine this product is for", source=source)
    elif AMD_VENDOR in view.vendors:
        yield Finding(
            status="ok",
            saw="an AMD GPU that is not a Strix Halo",
            why="kernel floor, TTM limit and wheel index are checked for gfx1151 only",
            source=source,
        )
    elif NVIDIA_VENDOR in view.vendors:
        yield Finding(
            status="ok", saw="an NVIDIA GPU", why="everything trains on CUDA too", source=source
        )
    elif not view.is_wsl:
        yield _no_gpu(source)


def _no_gpu(source: str) -> Finding:
    return Finding(
        status="warn",
        saw="no AMD and no NVIDIA GPU",
        why="training runs on the CPU: right, and slow; models up to about 1B",
        fix=Fix("stay with small models and the CPU build of torch", ("make setup TORCH=cpu",)),
        source=source,
    )


def _gpu_nodes(view: HostView) -> list[str]:
    """Targets (gfx1151 is 110501) of the compute nodes, in the order by which HIP counts them."""
    nodes = view.glob("/sys/class/kfd/kfd/topology/nodes/*/properties")
    nodes.sort(key=lambda path: int(path.parent.name) if path.parent.name.isdigit() else 0)
    targets = [re.search(r"gfx_target_version (\d+)", view.read(path) or "") for path in nodes]
    return [found[1] for found in targets if found and found[1] != "0"]


def check_several_gpus(view: HostView) -> Iterator[Finding]:
    """Another GPU beside the Strix Halo's: which one trains?"""
    nodes = _gpu_nodes(view)
    others = len(view.amd_cards) + (NVIDIA_VENDOR in view.vendors) - 1
    if view.strix_halo is None or others < 1:
        return
    chosen = view.environ.get("HIP_VISIBLE_DEVICES") or view.environ.get("ROCR_VISIBLE_DEVICES")
    index = nodes.index(GFX1151) if GFX1151 in nodes else 0
    external = any(view.read(card.folder / "removable") == "removable" for card in view.amd_cards)
    kind = "an external GPU" if external else "a second GPU"
    yield Finding(
        status="ok" if chosen else "warn",
        saw=f"{kind} beside the Strix Halo; HIP counts {len(nodes)} (/sys/class/kfd)"
        + (f"; HIP_VISIBLE_DEVICES={chosen}" if chosen else ""),
        why="torch takes the first GPU it counts, and plans read one card's memory",
        fix=Fix(
            "choose the GPU that trains, in ~/.profile",
            (f"export HIP_VISIBLE_DEVICES={index}",),
            "open a new terminal",
        ),
        source="https://rocm.docs.amd.com/en/latest/conceptual/gpu-isolation.html",
    )


def check_driver(view: HostView) -> Iterator[Finding]:
    """The driver amdgpu with its compute part, or NVIDIA's driver."""
    if view.is_wsl:
        return
    if view.strix_halo is not None:
        yield _amd_driver(view)
    elif NVIDIA_VENDOR in view.vendors:
        yield _nvidia_driver(view)


def _amd_driver(view: HostView) -> Finding:
    source = ROCM_INSTALL
    why = "ROCm reaches the GPU through /dev/kfd, which amdgpu makes"
    if view.exists("/dev/kfd"):
        return Finding(status="ok", saw="/dev/kfd", why=why, source=source)
    if view.is_container:
        fix = Fix(f"start the container with {CONTAINER_FLAGS}", ("container/toolbox.sh create",))
        saw = "no /dev/kfd in this container"
    elif "nomodeset" in view.kernel_arguments or _blacklisted(view):
        saw = "no /dev/kfd; nomodeset or a blacklist keeps amdgpu away (/proc/cmdline)"
        names = ("nomodeset", "modprobe.blacklist")
        fix = fix_kernel_arguments(view, "let the kernel load amdgpu", remove=names)
    elif view.exists("/sys/module/amdgpu"):
        saw = "amdgpu is loaded, /dev/kfd is missing: the compute part did not start"
        fix = Fix("read what the driver says", ("sudo dmesg | grep -iE 'kfd|amdgpu'",))
    else:
        saw = "no /dev/kfd; amdgpu is not loaded (/sys/module)"
        fix = Fix("load the driver", ("sudo modprobe amdgpu",))
    return Finding(status="fail", saw=saw, why=why, fix=fix, source=source)


def _blacklisted(view: HostView) -> bool:
    return "amdgpu" in view.kernel_arguments.get("modprobe.blacklist", "")


def _nvidia_driver(view: HostView) -> Finding:
    text = view.read("/proc/driver/nvidia/version") or ""
    version = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", text)
    source = "/proc/driver/nvidia/version"
    why = "CUDA needs NVIDIA's kernel driver"
    if version:
        return Finding(status="ok", saw=f"NVIDIA driver {version[0]}", why=why, source=source)
    container = Fix("start the container with --gpus all (docker) or --device nvidia.com/gpu=all")
    commands = install(
        view, debian="nvidia-driver", fedora="akmod-nvidia", arch="nvidia-open", suse="nvidia-open"
    )
    host = Fix("install NVIDIA's driver", commands, "reboot")
    return Finding(
        status="fail",
        saw="an NVIDIA GPU without its driver",
        why=why,
        fix=container if view.is_container else host,
        source=source,
    )


def check_access(view: HostView) -> Iterator[Finding]:
    """This user may open the devices."""
    if view.strix_halo is None or not view.exists("/dev/kfd"):
        return
    nodes = [view.path("/dev/kfd"), *view.glob("/dev/dri/renderD*")]
    closed = [view.shown(path) for path in nodes if not view.can_open(path)]
    why = "torch sees no GPU if this user may not open its devices"
    if not closed and len(nodes) > 1:
        names = " ".join(view.shown(path) for path in nodes)
        yield Finding(status="ok", saw=f"{names} can be opened", why=why, source=ROCM_INSTALL)
    else:
        yield Finding(
            status="fail",
            saw=f"{view.user.name} may not open {' '.join(closed) or '/dev/dri/renderD*'}"
            f" (groups: {' '.join(sorted(view.user.groups))})",
            why=why,
            fix=_grant(view),
            source=ROCM_INSTALL,
        )


def _grant(view: HostView) -> Fix:
    if view.is_container:
        return Fix(f"start the container with {CONTAINER_FLAGS}", ("container/toolbox.sh create",))
    if {"render", "video"} <= view.user.groups:
        rule = 'SUBSYSTEM=="kfd", GROUP="render", MODE="0666"'
        return Fix(
            "the groups are right, the devices' mode is not",
            (
                f"echo '{rule}' | sudo tee /etc/udev/rules.d/70-kfd.rules",
                "sudo udevadm control --reload && sudo udevadm trigger",
            ),
        )
    if read_distribution(view).family == "nixos":
        user = view.user.name
        line = f'users.users.{user}.extraGroups = [ "render" "video" ];'
        return Fix(f"in configuration.nix {line}", ("sudo nixos-rebuild switch",), "log in again")
    command = f"sudo usermod -aG render,video {shlex.quote(view.user.name)}"
    return Fix("join the groups of the GPU's devices", (command,), "log in again")


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
