"""Distribution and boot loader, and the commands that depend on them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from strixft.doctor.finding import Fix
from strixft.doctor.view import HostView

_RPM = ("rpm", "-q", "--qf", "%{VERSION}\\n")

_DPKG = ("dpkg-query", "-W", "-f", "${Version}\\n")

_DRACUT = "sudo dracut -f --regenerate-all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Distributions that share a package manager, and its commands; empty where there is none."""

    name: str
    members: tuple[str, ...]
    """Values of `ID` and `ID_LIKE`."""
    install: str = ""
    """Followed by the name of a package."""
    upgrade: str = ""
    """Updates every package within the release."""
    initramfs: str = ""
    """Copies changed module options to where the kernel reads them at boot."""
    firmware_query: tuple[str, ...] = ()
    """Prints the versions of the packages with the GPU's firmware."""


FAMILIES = (
    Family(
        name="fedora",
        members=("fedora", "rhel", "centos", "bazzite", "nobara"),
        install="sudo dnf install",
        upgrade="sudo dnf upgrade --refresh",
        initramfs=_DRACUT,
        firmware_query=(*_RPM, "linux-firmware", "amd-gpu-firmware"),
    ),
    Family(
        name="debian",
        members=("debian", "ubuntu", "linuxmint", "pop"),
        install="sudo apt install",
        upgrade="sudo apt update && sudo apt upgrade",
        initramfs="sudo update-initramfs -u -k all",
        firmware_query=(*_DPKG, "linux-firmware", "firmware-amd-graphics"),
    ),
    Family(
        name="arch",
        members=("arch", "cachyos", "endeavouros", "manjaro"),
        install="sudo pacman -S",
        upgrade="sudo pacman -Syu",
        initramfs="sudo mkinitcpio -P",
        firmware_query=("pacman", "-Q", "linux-firmware", "linux-firmware-amdgpu"),
    ),
    Family(
        name="suse",
        members=("suse", "opensuse", "opensuse-tumbleweed", "sles"),
        install="sudo zypper install",
        upgrade="sudo zypper update",
        initramfs=_DRACUT,
        firmware_query=(*_RPM, "kernel-firmware-amdgpu"),
    ),
    Family(name="nixos", members=("nixos",), upgrade="sudo nixos-rebuild boot --upgrade"),
)

UNKNOWN = Family(name="unknown", members=())


@dataclass(frozen=True, slots=True)
class Distribution:
    """The contents of `/etc/os-release`; empty texts for what it does not say."""

    id: str
    version: str
    """`VERSION_ID`; empty for a rolling release."""
    like: tuple[str, ...]
    name: str
    base: str
    """Code name of the Ubuntu that a derivative builds on, such as `noble`."""

    @property
    def family(self) -> Family:
        """The row of `FAMILIES`, or `UNKNOWN`."""
        known = (row for name in (self.id, *self.like) for row in FAMILIES if name in row.members)
        return next(known, UNKNOWN)

    @property
    def is_noble(self) -> bool:
        """Ubuntu 24.04 or a derivative, such as Linux Mint 22."""
        return self.base == "noble" or (self.id == "ubuntu" and self.version == "24.04")


def read_distribution(view: HostView) -> Distribution:
    """Read the host's `os-release` file."""
    text = view.read("/etc/os-release") or view.read("/usr/lib/os-release") or ""
    values: dict[str, str] = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            values[name.strip()] = value.strip().strip("\"'")
    return Distribution(
        id=values.get("ID", ""),
        version=values.get("VERSION_ID", ""),
        like=tuple(values.get("ID_LIKE", "").split()),
        name=values.get("PRETTY_NAME") or values.get("NAME") or values.get("ID") or "unknown",
        base=values.get("UBUNTU_CODENAME", ""),
    )


def _sed(script: str, file: str) -> str:
    return f"sudo sed -i -E '{script}' {file}"


def _boot_commands(view: HostView, names: tuple[str, ...], add: str) -> tuple[str, ...]:
    """Remove and add kernel arguments; empty where the boot loader is unknown."""
    family = read_distribution(view).family.name
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

    def in_quotes(variable: str) -> str:
        dropped = f"/^#?{variable}/ {{ {drop} }}"
        return rf"{dropped}; s/^#?({variable}=[\x22\x27])/\1{add} /" if add else dropped

    if view.exists(file := "/etc/default/limine"):
        line = shlex.quote(f'KERNEL_CMDLINE[default]+=" {add}"')
        append = (f"echo {line} | sudo tee -a {file}",) if add else ()
        has_hook = view.exists("/usr/bin/limine-mkinitcpio")
        update = "sudo limine-mkinitcpio" if has_hook else "sudo limine-update"
        return (_sed(f"/^KERNEL_CMDLINE/ {{ {drop} }}", file), *append, update)
    if view.exists(file := "/etc/sdboot-manage.conf"):
        return (_sed(in_quotes("LINUX_OPTIONS"), file), "sudo sdboot-manage gen")
    if view.exists(file := "/etc/default/grub"):
        mkconfig = "sudo grub-mkconfig -o /boot/grub/grub.cfg"
        update = "sudo update-grub" if family == "debian" else mkconfig
        return (_sed(in_quotes("GRUB_CMDLINE_LINUX_DEFAULT"), file), update)
    if view.exists(file := "/etc/kernel/cmdline"):
        return (_sed(at_end, file), "sudo mkinitcpio -P")
    if view.exists(folder := "/boot/loader/entries"):
        return (_sed(f"/^options/ {{ {at_end} }}", f"{folder}/*.conf"),)
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
    if read_distribution(view).family.name == "nixos":
        quoted = " ".join(f'"{word}"' for word in add.split())
        line = f"boot.kernelParams = [ {quoted} ]; {without}".strip()
        return Fix(f"{say}: in configuration.nix {line}", ("sudo nixos-rebuild boot",), "reboot")
    names = (*remove, *(word.partition("=")[0] for word in add.split()))
    if commands := _boot_commands(view, names, add):
        return Fix(say, commands, "reboot")
    wanted = " ".join(filter(None, (add, without)))
    return Fix(f"{say}: give your boot loader's kernel command line {wanted}", (), "reboot")


def rebuild_initramfs(view: HostView) -> tuple[str, ...]:
    """Return the command that rebuilds the initramfs, if the family is known."""
    command = read_distribution(view).family.initramfs
    return (command,) if command else ()


def upgrade(view: HostView) -> tuple[str, ...]:
    """Return the command that updates every package within the release, if it is known."""
    if view.exists("/run/ostree-booted"):
        return ("sudo rpm-ostree upgrade",)
    distribution = read_distribution(view)
    if distribution.id == "opensuse-tumbleweed":
        return ("sudo zypper dup",)  # it has no releases
    return (distribution.family.upgrade,) if distribution.family.upgrade else ()
