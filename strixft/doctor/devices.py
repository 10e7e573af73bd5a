"""The GPU itself, its driver, and who may open it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from strixft.doctor.distro import fix_kernel_arguments, install, read_distribution
from strixft.doctor.finding import Finding, Fix
from strixft.doctor.view import HostView
from strixft.hardware import AMD_VENDOR

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
