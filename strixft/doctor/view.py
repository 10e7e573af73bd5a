"""The host as the checks see it: files under a root, outputs of commands, the environment.

Every part can be given, so that a recorded host is checked by the same code as this machine.
Nothing here raises for a file that is absent, unreadable or not text: it is None.
"""

from __future__ import annotations

import contextlib
import grp
import importlib.util
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path

from strixft.catalog.hosts import AmdCard, read_amd_cards
from strixft.recipe.schema import Recipe
from strixft.support.child import Probe, run_steps

STEPS = ("import", "nf4", "attention", "head", "step", "flex")
"""What the child does, in its order; what compiles longest comes last."""

LIMIT_S = 120.0
"""A first run on a new GPU compiles kernels; seconds are the rule."""

CHILD = (sys.executable, "-m", "strixft.doctor.probe_child")


def run_probe(limit_s: float = LIMIT_S, command: Sequence[str] | None = None) -> Probe:
    """Run the child and collect what it found out.

    Args:
        limit_s: It is ended after this time.
        command: Another child, in tests; it gets the output file as its last word.
    """
    if command is None and importlib.util.find_spec("torch") is None:
        return Probe(ended="no torch")
    return run_steps(command or CHILD, limit_s)


COMMAND_LIMIT_S = 3.0

MOST_BYTES = 2**46
"""64 TiB: a machine that reports more reports nonsense."""


def run_command(words: Sequence[str]) -> str | None:
    """Standard output of a command; None if there is no such command or it does not answer.

    The exit code does not count: `systemctl is-active` says "inactive" with code 3.
    """
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_LIMIT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip()


def installed_version(package: str) -> str | None:
    """Version of a Python package in this environment, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def free_bytes(path: Path) -> int | None:
    """Free space where a path lies, or would lie."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class User:
    """Who runs this, and the groups that this process has."""

    name: str
    groups: frozenset[str]


def current_user() -> User:
    """The user of this process."""
    names = set()
    for number in {os.getegid(), *os.getgroups()}:
        with contextlib.suppress(KeyError):
            names.add(grp.getgrgid(number).gr_name)
    try:
        name = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container may run a number without a name
        name = str(os.geteuid())
    return User(name, frozenset(names))


def can_open(path: Path) -> bool:
    """This process may read and write a device."""
    return os.access(path, os.R_OK | os.W_OK)


@dataclass(frozen=True)
class HostView:
    """A host, live or recorded."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    command: Callable[[Sequence[str]], str | None] = run_command
    package_version: Callable[[str], str | None] = installed_version
    can_open: Callable[[Path], bool] = can_open
    free_bytes: Callable[[Path], int | None] = free_bytes
    user: User = field(default_factory=current_user)
    home: str = field(default_factory=lambda: str(Path.home()))
    prefix: str = sys.prefix
    """Folder of this Python environment."""
    machine: str = field(default_factory=lambda: os.uname().machine)
    probe: Callable[[], Probe | None] = run_probe
    """What torch does here, found out in a child process; None where it was not asked."""
    recipe: Recipe | None = None

    def path(self, name: str) -> Path:
        """A path of the host, under the root."""
        return self.root / name.lstrip("/")

    def exists(self, name: str) -> bool:
        """The path exists, readable or not."""
        return os.path.lexists(self.path(name))

    def read(self, name: str | Path) -> str | None:
        """Text of a file, stripped; None if it is absent, unreadable or not a file."""
        path = name if isinstance(name, Path) else self.path(name)
        try:
            return path.read_text(encoding="utf-8", errors="replace").strip("\0\n\t ")
        except (OSError, ValueError):
            return None

    def read_int(self, name: str | Path) -> int | None:
        """A whole number from a file."""
        try:
            return int(self.read(name) or "")
        except ValueError:
            return None

    def glob(self, pattern: str) -> list[Path]:
        """Paths under the root that match, sorted."""
        try:
            return sorted(self.root.glob(pattern.lstrip("/")))
        except OSError:
            return []

    def shown(self, path: Path) -> str:
        """A path as the host has it, without the root."""
        return "/" + str(path.relative_to(self.root))

    @cached_property
    def release(self) -> str:
        """`uname -r`."""
        return self.read("/proc/sys/kernel/osrelease") or ""

    @cached_property
    def kernel_arguments(self) -> dict[str, str]:
        """The kernel's command line by name; the last one counts, as in the kernel."""
        words = (self.read("/proc/cmdline") or "").split()
        pairs = (word.partition("=") for word in words)
        return {name.replace("-", "_"): value for name, _, value in pairs}

    @cached_property
    def memory_total(self) -> int | None:
        """Bytes of RAM that the kernel has, without the VRAM carve-out."""
        return self._meminfo("MemTotal")

    def _meminfo(self, key: str) -> int | None:
        for line in (self.read("/proc/meminfo") or "").splitlines():
            name, _, value = line.partition(":")
            if name == key and value.split() and value.split()[0].isdigit():
                return int(value.split()[0]) * 1024
        return None

    @cached_property
    def amd_cards(self) -> list[AmdCard]:
        """AMD display devices."""
        return read_amd_cards(self.root)

    @cached_property
    def strix_halo(self) -> AmdCard | None:
        """The GPU of a Strix Halo chip, if this host has one."""
        return next((card for card in self.amd_cards if card.is_strix_halo), None)

    @cached_property
    def vendors(self) -> frozenset[str]:
        """PCI vendors of the display devices, such as `0x1002`."""
        classes = {
            path.parent: self.read(path) for path in self.glob("/sys/bus/pci/devices/*/class")
        }
        devices = [folder for folder, kind in classes.items() if (kind or "").startswith("0x03")]
        devices += [path.parent for path in self.glob("/sys/class/drm/card*/device/vendor")]
        return frozenset(filter(None, (self.read(device / "vendor") for device in devices)))

    @property
    def is_wsl(self) -> bool:
        """Linux inside Windows."""
        return "microsoft" in self.release.lower() or "wsl" in self.release.lower()

    @property
    def is_container(self) -> bool:
        """Inside a container: the kernel is the host's, the packages are not."""
        return self.exists("/run/.containerenv") or self.exists("/.dockerenv")

    @cached_property
    def package_folder(self) -> Path:
        """Where Python packages of this environment lie."""
        folders = self.glob(f"{self.prefix}/lib/python3*/site-packages")
        return folders[-1] if folders else self.path(self.prefix)


def plausible(num_bytes: int | None) -> int | None:
    """The number, or None if no machine has so much or so little."""
    return num_bytes if num_bytes is not None and 0 <= num_bytes < MOST_BYTES else None
