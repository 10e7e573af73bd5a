"""Distribution and boot loader, and the fixes that depend on them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from strixft.doctor.finding import Fix
from strixft.doctor.view import HostView

FAMILIES = {
    "fedora": ("fedora", "rhel", "centos", "bazzite", "nobara"),
    "debian": ("debian", "ubuntu", "linuxmint", "pop"),
    "arch": ("arch", "cachyos", "endeavouros", "manjaro"),
    "suse": ("suse", "opensuse", "opensuse-tumbleweed", "sles"),
    "nixos": ("nixos",),
}
"""Distributions that share a package manager, by the names of `ID` and `ID_LIKE`."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """What `/etc/os-release` says."""

    id: str
    version: str
    """`VERSION_ID`; empty for a rolling release, and where the file does not say."""
    like: tuple[str, ...]
    name: str
    base: str
    """Code name of the Ubuntu that a derivative builds on, such as `noble`."""

    @property
    def family(self) -> str:
        """A key of `FAMILIES`, or `unknown`."""
        for name in (self.id, *self.like):
            for family, members in FAMILIES.items():
                if name in members:
                    return family
        return "unknown"

    @property
    def is_noble(self) -> bool:
        """Ubuntu 24.04 or built on it, such as Linux Mint 22."""
        return self.base == "noble" or (self.id == "ubuntu" and self.version == "24.04")


def read_distribution(view: HostView) -> Distribution:
    """The host's distribution; empty texts where it does not say."""
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


def boot_loader(view: HostView) -> str:
    """What writes the kernel's command line here: a key of `_EDITS`, or `unknown`."""
    family = read_distribution(view).family
    if family == "nixos":
        return "nixos"
    if view.exists("/run/ostree-booted"):
        return "rpm-ostree"
    if family == "fedora":
        return "grubby"
    for loader, path in (
        ("limine", "/etc/default/limine"),
        ("sdboot-manage", "/etc/sdboot-manage.conf"),
        ("grub", "/etc/default/grub"),
        ("kernel-cmdline", "/etc/kernel/cmdline"),
        ("loader-entries", "/boot/loader/entries"),
    ):
        if view.exists(path):
            return loader
    return "unknown"


def _escaped(name: str) -> str:
    return re.escape(name).replace("/", r"\/")


def _drop(names: tuple[str, ...]) -> str:
    """sed: take arguments away, with their values."""
    return "; ".join(rf"s/ ?\b{_escaped(name)}(=[^ \x22\x27]*)?//g" for name in names)


def _sed(script: str, file: str) -> str:
    return f"sudo sed -i -E '{script}' {file}"


def _grubby(view: HostView, names: tuple[str, ...], add: str) -> tuple[str, ...]:
    command = f'sudo grubby --update-kernel=ALL --remove-args="{" ".join(names)}"'
    return (command, f'sudo grubby --update-kernel=ALL --args="{add}"') if add else (command,)


def _ostree(view: HostView, names: tuple[str, ...], add: str) -> tuple[str, ...]:
    old = "".join(f" --delete-if-present={name}" for name in names)
    new = "".join(f" --append-if-missing={word}" for word in add.split())
    return (f"sudo rpm-ostree kargs{old}{new}",)


def _edit_quoted(variable: str, names: tuple[str, ...], add: str) -> str:
    """sed: change the arguments inside `VARIABLE="…"`, in either kind of quotes."""
    drop = f"/^#?{variable}/ {{ {_drop(names)} }}"
    return rf"{drop}; s/^#?({variable}=[\x22\x27])/\1{add} /" if add else drop


def _grub(view: HostView, names: tuple[str, ...], add: str) -> tuple[str, ...]:
    debian = read_distribution(view).family == "debian"
    update = "sudo update-grub" if debian else "sudo grub-mkconfig -o /boot/grub/grub.cfg"
    script = _edit_quoted("GRUB_CMDLINE_LINUX_DEFAULT", names, add)
    return (_sed(script, "/etc/default/grub"), update)


def _sdboot_manage(view: HostView, names: tuple[str, ...], add: str) -> tuple[str, ...]:
    script = _edit_quoted("LINUX_OPTIONS", names, add)
    return (_sed(script, "/etc/sdboot-manage.conf"), "sudo sdboot-manage gen")


def _limine(view: HostView, names: tuple[str, ...], add: str) -> tuple[str, ...]:
    line = shlex.quote(f'KERNEL_CMDLINE[default]+=" {add}"')
    put = (f"echo {line} | sudo tee -a /etc/default/limine",) if add else ()
    update = "limine-mkinitcpio" if view.exists("/usr/bin/limine-mkinitcpio") else "limine-update"
    drop = _sed(f"/^KERNEL_CMDLINE/ {{ {_drop(names)} }}", "/etc/default/limine")
    return (drop, *put, f"sudo {update}")


def _one_line(names: tuple[str, ...], add: str) -> str:
    return f"{_drop(names)}; s/$/ {add}/" if add else _drop(names)


def _kernel_cmdline(view: HostView, names: tuple[str, ...], add: str) -> tuple[str, ...]:
    return (_sed(_one_line(names, add), "/etc/kernel/cmdline"), "sudo mkinitcpio -P")


def _loader_entries(view: HostView, names: tuple[str, ...], add: str) -> tuple[str, ...]:
    script = f"/^options/ {{ {_one_line(names, add)} }}"
    return (_sed(script, "/boot/loader/entries/*.conf"),)


_EDITS: Mapping[str, Callable[[HostView, tuple[str, ...], str], tuple[str, ...]]] = {
    "grubby": _grubby,
    "rpm-ostree": _ostree,
    "grub": _grub,
    "sdboot-manage": _sdboot_manage,
    "limine": _limine,
    "kernel-cmdline": _kernel_cmdline,
    "loader-entries": _loader_entries,
}


def fix_kernel_arguments(
    view: HostView, say: str, *, add: str = "", remove: tuple[str, ...] = ()
) -> Fix:
    """How to change the kernel's command line on this host.

    Args:
        view: The host.
        say: What the change does.
        add: Arguments to have, such as `ttm.pages_limit=28573696`; older values go.
        remove: Names of arguments to take away.
    """
    names = (*remove, *(word.partition("=")[0] for word in add.split()))
    loader = boot_loader(view)
    if loader in _EDITS:
        return Fix(say, _EDITS[loader](view, names, add), "reboot")
    gone = f"without {' '.join(remove)}" if remove else ""
    if loader == "nixos":
        quoted = " ".join(f'"{word}"' for word in add.split())
        line = f"boot.kernelParams = [ {quoted} ]; {gone}".strip()
        return Fix(f"{say}: in configuration.nix {line}", ("sudo nixos-rebuild boot",), "reboot")
    wanted = " ".join(filter(None, (add, gone)))
    return Fix(f"{say}: give your boot loader's kernel command line {wanted}", (), "reboot")


INSTALL = {
    "fedora": "sudo dnf install {}",
    "debian": "sudo apt install {}",
    "arch": "sudo pacman -S {}",
    "suse": "sudo zypper install {}",
}


def install(view: HostView, **packages: str) -> tuple[str, ...]:
    """Command that installs a package here; none where it has no name for this family."""
    family = read_distribution(view).family
    package = packages.get(family)
    return (INSTALL[family].format(package),) if package and family in INSTALL else ()


INITRAMFS = {
    "fedora": "sudo dracut -f --regenerate-all",
    "debian": "sudo update-initramfs -u -k all",
    "arch": "sudo mkinitcpio -P",
    "suse": "sudo dracut -f --regenerate-all",
}


def rebuild_initramfs(view: HostView) -> tuple[str, ...]:
    """Command that puts changed module options where the kernel reads them at its start."""
    command = INITRAMFS.get(read_distribution(view).family)
    return (command,) if command else ()


UPGRADE = {
    "fedora": "sudo dnf upgrade --refresh",
    "debian": "sudo apt update && sudo apt upgrade",
    "arch": "sudo pacman -Syu",
    "suse": "sudo zypper update",
    "nixos": "sudo nixos-rebuild boot --upgrade",
}


def upgrade(view: HostView) -> tuple[str, ...]:
    """Command that brings every package up to date, within the release of the distribution."""
    distribution = read_distribution(view)
    if view.exists("/run/ostree-booted"):
        return ("sudo rpm-ostree upgrade",)
    if distribution.id == "opensuse-tumbleweed":
        return ("sudo zypper dup",)  # it has no releases
    family = distribution.family
    return (UPGRADE[family],) if family in UPGRADE else ()
