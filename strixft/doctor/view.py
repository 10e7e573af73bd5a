"""The host as the checks see it: files under a root, outputs of commands, the environment.

Every part can be replaced, so the same code checks a recorded host and this machine. A file that is
absent, unreadable or not text reads as None; nothing here raises for it.
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

from strixft.catalog.hosts import AmdCard, read_amd_cards, read_meminfo
from strixft.recipe.schema import Recipe
from strixft.support.child import Probe, run_steps
from strixft.support.errors import HostError

PROBE_LIMIT_S = 120.0
"""A first run on a new GPU compiles kernels; it usually takes seconds."""

CHILD = (sys.executable, "-m", "strixft.doctor.probe_child")

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
    return run_steps(command or CHILD, limit_s)


def run_command(words: Sequence[str]) -> str | None:
    """Return the standard output of a command; None if it is missing or does not answer.

    The exit code does not count: `systemctl is-active` says "inactive" with code 3.
    """
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


def installed_version(package: str) -> str | None:
    """Return the version of a Python package in this environment, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
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


def free_bytes(path: Path) -> int | None:
    """Return the free space at a path, which may not exist yet."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class User:
    """The user of this process and the groups that the process has."""

    name: str
    groups: frozenset[str]


def current_user() -> User:
    """Return the user of this process."""
    names = set()
    for number in {os.getegid(), *os.getgroups()}:
        with contextlib.suppress(KeyError):
            names.add(grp.getgrgid(number).gr_name)
    try:
        name = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container may run a number without a name
        name = str(os.geteuid())
    return User(name, frozenset(names))


@dataclass(frozen=True)
class HostView:
    """A host, live or recorded."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    command: Callable[[Sequence[str]], str | None] = run_command
    package_version: Callable[[str], str | None] = installed_version
    can_open: Callable[[Path], bool] = lambda path: os.access(path, os.R_OK | os.W_OK)
    free_bytes: Callable[[Path], int | None] = free_bytes
    user: User = field(default_factory=current_user)
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
        try:
            return path.read_text(encoding="utf-8", errors="replace").strip("\0\n\t ")
        except (OSError, ValueError):
            return None

    def read_int(self, name: str | Path) -> int | None:
        """Return the integer in a file."""
        try:
            return int(self.read(name) or "")
        except ValueError:
            return None

    def glob(self, pattern: str) -> list[Path]:
        """Return the sorted paths under the root that match."""
        try:
            return sorted(self.root.glob(pattern.lstrip("/")))
        except OSError:
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
    def vendors(self) -> frozenset[str]:
        """PCI vendors of the display devices, such as `0x1002`."""
        classes = self.glob("/sys/bus/pci/devices/*/class")
        devices = [path.parent for path in classes if (self.read(path) or "").startswith("0x03")]
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


def plausible(num_bytes: int | None) -> int | None:
    """Return the number, or None if no machine has so much or so little."""
    return num_bytes if num_bytes is not None and 0 <= num_bytes < MOST_BYTES else None
