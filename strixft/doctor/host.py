"""The host as the checks see it, and the commands that change it.

Every part of a `HostView` can be replaced, so the same code checks a recorded host and this
machine. A file that is absent, unreadable or not text reads as None; nothing here raises for it.
"""

from __future__ import annotations

import contextlib
import grp
import importlib.util
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path

from strixft.catalog.hosts import AmdCard, read_amd_cards, read_meminfo
from strixft.doctor.finding import Fix
from strixft.recipe.schema import Recipe
from strixft.support.child import Probe, run_steps
from strixft.support.errors import HostError

AMD_DOC = (
    "https://rocm.docs.amd.com/en/docs-7.14.0/_sources/reference/system-optimization/rdna3-5.rst"
)

FINETUNE_GUIDE = "h34v3nzc0dex/strix-halo-llm-finetune-guide: README.md"

NVIDIA_VENDOR = "0x10de"

PROBE_LIMIT_S = 120.0
"""A first run on a new GPU compiles kernels; it usually takes seconds."""

COMMAND_LIMIT_S = 3.0

MOST_BYTES = 2**46
"""64 TiB: a machine that reports more is wrong."""


def run_probe(limit_s: float = PROBE_LIMIT_S, command: Sequence[str] | None = None) -> Probe:
    """Try torch in a child process.

    Args:
        limit_s: Time after which the child is killed.
        command: Another child, for tests; the output file is appended as its last argument.
    """
    if command is None and importlib.util.find_spec("torch") is None:
        return Probe(ended="no torch")
    return run_steps(command or (sys.executable, "-m", "strixft.doctor.probe_child"), limit_s)


def _run_command(words: Sequence[str]) -> str | None:
    """Return the output of a command, whose exit code does not count (`systemctl is-active`)."""
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip()


def _installed_version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def package_folder(prefix: Path, name: str, python: tuple[int, int]) -> Path:
    """Return the folder of a Python package; it may not exist.

    Args:
        prefix: Root of the environment.
        name: Import name, such as `torch`.
        python: Version of the interpreter: an environment can hold packages of several.
    """
    version = ".".join(map(str, python))
    # Fedora's own Python keeps compiled packages in lib64 and pure ones in lib
    folders = [prefix / lib / f"python{version}/site-packages" / name for lib in ("lib64", "lib")]
    return next(filter(Path.is_dir, folders), folders[-1])


def _free_bytes(path: Path) -> int | None:
    """Return the free space at a path, which may not exist yet."""
    with contextlib.suppress(OSError):
        return shutil.disk_usage(next(at for at in (path, *path.parents) if at.exists())).free
    return None


@dataclass(frozen=True, slots=True)
class User:
    """The user of this process and the groups that the process has."""

    name: str
    groups: frozenset[str]


def _current_user() -> User:
    name, groups = str(os.geteuid()), set()
    with contextlib.suppress(KeyError):  # a container may run a number without a name
        name = pwd.getpwuid(os.geteuid()).pw_name
    for number in {os.getegid(), *os.getgroups()}:
        with contextlib.suppress(KeyError):
            groups.add(grp.getgrgid(number).gr_name)
    return User(name, frozenset(groups))


@dataclass(frozen=True)
class HostView:
    """A host, live or recorded."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    command: Callable[[Sequence[str]], str | None] = _run_command
    """Return the standard output; None if the command is missing or does not answer."""
    package_version: Callable[[str], str | None] = _installed_version
    """Return the version of a Python package in this environment, without importing it."""
    can_open: Callable[[Path], bool] = lambda path: os.access(path, os.R_OK | os.W_OK)
    free_bytes: Callable[[Path], int | None] = _free_bytes
    user: User = field(default_factory=_current_user)
    home: str = field(default_factory=lambda: str(Path.home()))
    prefix: str = sys.prefix
    """Folder of this Python environment."""
    python: tuple[int, int] = sys.version_info[:2]
    machine: str = field(default_factory=lambda: os.uname().machine)
    probe: Callable[[], Probe | None] = run_probe
    """Results of torch in a child process; None to leave torch out."""
    recipe: Recipe | None = None

    def path(self, name: str) -> Path:
        """Return a path of the host, under the root."""
        return self.root / name.lstrip("/")

    def exists(self, name: str) -> bool:
        """Return whether the path exists, readable or not."""
        return os.path.lexists(self.path(name))

    def read(self, name: str | Path) -> str | None:
        """Return the stripped text of a file; None if it is absent, unreadable or not a file."""
        path = name if isinstance(name, Path) else self.path(name)
        with contextlib.suppress(OSError, ValueError):
            return path.read_text(encoding="utf-8", errors="replace").strip("\0\n\t ")
        return None

    def read_int(self, name: str | Path) -> int | None:
        """Return the integer in a file."""
        with contextlib.suppress(ValueError):
            return int(self.read(name) or "")
        return None

    def glob(self, pattern: str) -> list[Path]:
        """Return the sorted paths under the root that match."""
        with contextlib.suppress(OSError):
            return sorted(self.root.glob(pattern.lstrip("/")))
        return []

    def shown(self, path: Path) -> str:
        """Return a path as the host has it, without the root."""
        return "/" + str(path.relative_to(self.root))

    def package_folder(self, name: str) -> Path:
        """Return the folder of a Python package in this environment; it may not exist."""
        return package_folder(self.path(self.prefix), name, self.python)

    @cached_property
    def release(self) -> str:
        """`uname -r`."""
        return self.read("/proc/sys/kernel/osrelease") or ""

    @cached_property
    def kernel_arguments(self) -> dict[str, str]:
        """The kernel's command line by name; the last value counts, as in the kernel."""
        words = (self.read("/proc/cmdline") or "").split()
        pairs = (word.partition("=") for word in words)
        return {name.replace("-", "_"): value for name, _, value in pairs}

    @cached_property
    def memory_total(self) -> int | None:
        """Bytes of RAM that the kernel has, without the VRAM carve-out."""
        with contextlib.suppress(HostError, ValueError):
            return read_meminfo(self.root).get("MemTotal")
        return None

    @cached_property
    def amd_cards(self) -> list[AmdCard]:
        """AMD display devices."""
        return read_amd_cards(self.root)

    @cached_property
    def strix_halo(self) -> AmdCard | None:
        """The GPU of a Strix Halo chip, or None."""
        return next((card for card in self.amd_cards if card.is_strix_halo), None)

    @property
    def card(self) -> AmdCard:
        """The GPU of a Strix Halo chip, in checks that run only there."""
        assert self.strix_halo is not None
        return self.strix_halo

    @cached_property
    def vendors(self) -> set[str | None]:
        """PCI vendors of the display devices, such as `0x1002`."""
        classes = self.glob("/sys/bus/pci/devices/*/class")
        devices = [path.parent for path in classes if (self.read(path) or "").startswith("0x03")]
        devices += [path.parent for path in self.glob("/sys/class/drm/card*/device/vendor")]
        return {self.read(device / "vendor") for device in devices}

    @property
    def is_wsl(self) -> bool:
        """Linux inside Windows."""
        return re.search("microsoft|wsl", self.release.lower()) is not None

    @property
    def is_container(self) -> bool:
        """Inside a container: the kernel is the host's, the packages are not."""
        return self.exists("/run/.containerenv") or self.exists("/.dockerenv")

    @cached_property
    def os_release(self) -> Mapping[str, str]:
        """The values of `/etc/os-release`; empty texts for what it does not say."""
        text = self.read("/etc/os-release") or self.read("/usr/lib/os-release") or ""
        found = re.findall(r"^\s*([^=\n]+?)\s*=(.*)$", text, re.MULTILINE)
        return defaultdict(str, {name: value.strip().strip("\"'") for name, value in found})

    @property
    def distribution(self) -> str:
        """The distribution's name for people."""
        names = (self.os_release[key] for key in ("PRETTY_NAME", "NAME", "ID"))
        return next(filter(None, names), "unknown")

    @cached_property
    def family(self) -> Family:
        """The row of `FAMILIES`, or one without members."""
        names = (self.os_release["ID"], *self.os_release["ID_LIKE"].split())
        known = (row for name in names for row in FAMILIES if name in row.members)
        return next(known, Family(name="unknown"))


def plausible(num_bytes: int | None) -> int | None:
    """Return the number, or None if no machine has so much or so little."""
    return num_bytes if num_bytes is not None and 0 <= num_bytes < MOST_BYTES else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Distributions that share a package manager, and its commands; empty where there is none."""

    name: str
    members: tuple[str, ...] = ()
    """Values of `ID` and `ID_LIKE`."""
    install: str = ""
    """Followed by the name of a package."""
    upgrade: str = ""
    """Updates every package within the release."""
    initramfs: str = ""
    """Copies changed module options to where the kernel reads them at boot."""
    firmware_query: tuple[str, ...] = ()
    """Prints the versions of the packages with the GPU's firmware."""
    nvidia_driver: str = ""


_RPM = ("rpm", "-q", "--qf", "%{VERSION}\\n")

_DPKG = ("dpkg-query", "-W", "-f", "${Version}\\n")

_DRACUT = "sudo dracut -f --regenerate-all"

FAMILIES = (
    Family(
        name="fedora",
        members=("fedora", "rhel", "centos", "bazzite", "nobara"),
        install="sudo dnf install",
        upgrade="sudo dnf upgrade --refresh",
        initramfs=_DRACUT,
        firmware_query=(*_RPM, "linux-firmware", "amd-gpu-firmware"),
        nvidia_driver="akmod-nvidia",
    ),
    Family(
        name="debian",
        members=("debian", "ubuntu", "linuxmint", "pop"),
        install="sudo apt install",
        upgrade="sudo apt update && sudo apt upgrade",
        initramfs="sudo update-initramfs -u -k all",
        firmware_query=(*_DPKG, "linux-firmware", "firmware-amd-graphics"),
        nvidia_driver="nvidia-driver",
    ),
    Family(
        name="arch",
        members=("arch", "cachyos", "endeavouros", "manjaro"),
        install="sudo pacman -S",
        upgrade="sudo pacman -Syu",
        initramfs="sudo mkinitcpio -P",
        firmware_query=("pacman", "-Q", "linux-firmware", "linux-firmware-amdgpu"),
        nvidia_driver="nvidia-open",
    ),
    Family(
        name="suse",
        members=("suse", "opensuse", "opensuse-tumbleweed", "sles"),
        install="sudo zypper install",
        upgrade="sudo zypper update",
        initramfs=_DRACUT,
        firmware_query=(*_RPM, "kernel-firmware-amdgpu"),
        nvidia_driver="nvidia-open",
    ),
    Family(name="nixos", members=("nixos",), upgrade="sudo nixos-rebuild boot --upgrade"),
)


def _boot_commands(view: HostView, names: tuple[str, ...], add: str) -> tuple[str, ...]:
    """Remove and add kernel arguments; empty where the boot loader is unknown."""
    family = view.family.name
    if view.exists("/run/ostree-booted"):
        old = "".join(f" --delete-if-present={name}" for name in names)
        new = "".join(f" --append-if-missing={word}" for word in add.split())
        return (f"sudo rpm-ostree kargs{old}{new}",)
    if family == "fedora":
        grubby = "sudo grubby --update-kernel=ALL"
        append = (f'{grubby} --args="{add}"',) if add else ()
        return (f'{grubby} --remove-args="{" ".join(names)}"', *append)

    patterns = [re.escape(name).replace("/", r"\/") for name in names]
    drop = "; ".join(rf"s/ ?\b{pattern}(=[^ \x22\x27]*)?//g" for pattern in patterns)
    at_end = f"{drop}; s/$/ {add}/" if add else drop

    def sed(script: str, file: str) -> str:
        return f"sudo sed -i -E '{script}' {file}"

    def in_quotes(variable: str) -> str:
        dropped = f"/^#?{variable}/ {{ {drop} }}"
        return rf"{dropped}; s/^#?({variable}=[\x22\x27])/\1{add} /" if add else dropped

    if view.exists(file := "/etc/default/limine"):
        line = shlex.quote(f'KERNEL_CMDLINE[default]+=" {add}"')
        append = (f"echo {line} | sudo tee -a {file}",) if add else ()
        has_hook = view.exists("/usr/bin/limine-mkinitcpio")
        update = "sudo limine-mkinitcpio" if has_hook else "sudo limine-update"
        return (sed(f"/^KERNEL_CMDLINE/ {{ {drop} }}", file), *append, update)
    if view.exists(file := "/etc/sdboot-manage.conf"):
        return (sed(in_quotes("LINUX_OPTIONS"), file), "sudo sdboot-manage gen")
    if view.exists(file := "/etc/default/grub"):
        mkconfig = "sudo grub-mkconfig -o /boot/grub/grub.cfg"
        update = "sudo update-grub" if family == "debian" else mkconfig
        return (sed(in_quotes("GRUB_CMDLINE_LINUX_DEFAULT"), file), update)
    if view.exists(file := "/etc/kernel/cmdline"):
        return (sed(at_end, file), "sudo mkinitcpio -P")
    if view.exists(folder := "/boot/loader/entries"):
        return (sed(f"/^options/ {{ {at_end} }}", f"{folder}/*.conf"),)
    return ()


def fix_kernel_arguments(
    view: HostView, say: str, *, add: str = "", remove: tuple[str, ...] = ()
) -> Fix:
    """Build the fix that changes the kernel's command line on this host.

    Args:
        view: The host.
        say: What the change does.
        add: Arguments to set, such as `ttm.pages_limit=28573696`; older values are removed.
        remove: Names of arguments to remove.
    """
    without = f"without {' '.join(remove)}" if remove else ""
    if view.family.name == "nixos":
        quoted = " ".join(f'"{word}"' for word in add.split())
        line = f"boot.kernelParams = [ {quoted} ]; {without}".strip()
        return Fix(f"{say}: in configuration.nix {line}", ("sudo nixos-rebuild boot",), "reboot")
    names = (*remove, *(word.partition("=")[0] for word in add.split()))
    if commands := _boot_commands(view, names, add):
        return Fix(say, commands, "reboot")
    wanted = " ".join(filter(None, (add, without)))
    return Fix(f"{say}: give your boot loader's kernel command line {wanted}", (), "reboot")


def upgrade(view: HostView) -> tuple[str, ...]:
    """Return the command that updates every package within the release, if it is known."""
    if view.exists("/run/ostree-booted"):
        return ("sudo rpm-ostree upgrade",)
    if view.os_release["ID"] == "opensuse-tumbleweed":
        return ("sudo zypper dup",)  # it has no releases
    return tuple(filter(None, (view.family.upgrade,)))
