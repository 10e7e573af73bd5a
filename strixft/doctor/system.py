"""Checks of kernel, firmware and what ends a long run: swap, reclaim, sleep, a full disk."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from strixft.doctor.finding import Finding, Fix, check
from strixft.doctor.host import AMD_DOC, FINETUNE_GUIDE, HostView, upgrade
from strixft.doctor.memory import reserve_gib
from strixft.recipe.find import workspace
from strixft.support.units import GIB, format_gib

GUIDE = f"{FINETUNE_GUIDE} (measured)"

FLOOR = (6, 18, 4)
"""First mainline kernel with both KFD fixes (commits 7f26af7, 7445db6)."""

NOBLE_GENERIC, NOBLE_OEM = (6, 17, 0, 19), (6, 14, 0, 1018)
"""Ubuntu 24.04 has the fixes as patches: HWE kernel 6.17.0-19.19~24.04.2, OEM 6.14.0-1018."""

BAD_FIRMWARE = "20251125"

SUSPECT_KERNEL, SUSPECT_FIRMWARE = (7, 2), "20260810"
"""A pair; the same user space does not fault with older firmware."""

LARGEST_ZRAM = 16 * GIB

SPARE = 10 * GIB
"""Prepared data, checkpoints of an adapter, the report."""


def kernel_version(release: str) -> tuple[int, ...] | None:
    """Return the three numbers of a kernel release, and Ubuntu's build number if there is one.

    >>> kernel_version("6.17.0-19-generic"), kernel_version("6.18.9-200.fc43.x86_64")
    ((6, 17, 0, 19), (6, 18, 9, 200))
    >>> kernel_version("6.19-rc3"), kernel_version("nonsense")
    ((6, 19, 0), None)
    """
    found = re.match(r"(\d{1,3})\.(\d{1,4})(?:\.(\d{1,6}))?(?:-(\d{1,6})\b)?", release)
    if found is None:
        return None
    major, minor, patch, build = (int(part or 0) for part in found.groups())
    return (major, minor, patch, build) if build else (major, minor, patch)


@check("platform", source="kernel release and marker files")
def platform(view: HostView) -> Finding:
    """Check for Linux on the machine itself, in a container, or inside Windows."""
    if view.is_wsl:
        saw = f"kernel {view.release}: Linux inside Windows (WSL)"
        if view.exists("/usr/lib/wsl/lib/libcuda.so.1"):
            return Finding("ok", saw, why="CUDA comes through from Windows")
        return Finding(
            "fail" if view.exists("/dev/dxg") else "warn",
            saw,
            Fix("install Linux beside Windows or instead of it: Fedora 43, Ubuntu 26.04"),
            "WSL has no /dev/kfd and Windows keeps half of the memory; checks and fixes from here"
            " do not reach the GPU",
        )
    where, why = "on the machine itself", "everything can be seen from here"
    if view.is_container:
        where = "inside a container"
        why = "kernel, memory limits and devices are the host's; packages are the container's"
    return Finding("ok", f"Linux, {view.machine}, {where}", why=why)


@check(
    "distribution",
    source="/etc/os-release, https://www.freedesktop.org/software/systemd/man/os-release.html",
)
def distribution(view: HostView) -> Finding:
    """Check that the distribution is known, since fixes and floors depend on it."""
    saw = f"{view.distribution} (/etc/os-release)"
    if view.family.members:
        return Finding("ok", saw, why="the fixes below are commands for it")
    say = "read the fixes as descriptions; check /etc/os-release"
    why = "the fixes below name the change, not the command for this distribution"
    return Finding("unknown", saw, Fix(say, ("cat /etc/os-release",)), why)


def _is_noble(view: HostView) -> bool:
    """Ubuntu 24.04 or a derivative, such as Linux Mint 22."""
    release = view.os_release
    is_it = release["ID"] == "ubuntu" and release["VERSION_ID"] == "24.04"
    return is_it or release["UBUNTU_CODENAME"] == "noble"


def _newer_kernel(view: HostView) -> Fix:
    def next_release(name: str, guide: str) -> Fix:  # a decision after a backup, never a command
        return Fix(
            f"no kernel of this release is new enough: go to {name}, by hand and after a backup,"
            f" as {guide} says; then run strixft doctor again"
        )

    name, version = view.os_release["ID"], view.os_release["VERSION_ID"]
    if _is_noble(view):
        command = "sudo apt update && sudo apt install linux-generic-hwe-24.04"
        return Fix("install the HWE kernel, 6.17.0-19 or newer", (command,), "reboot")
    if name == "ubuntu" and version < "26.04":
        return next_release("Ubuntu 26.04", "https://documentation.ubuntu.com/release-notes/")
    if name == "debian":
        if version.isdigit() and int(version) < 13:
            notes = "https://www.debian.org/releases/trixie/release-notes/"
            return next_release("Debian 13", notes)
        suites = r"/^Suites:/ { /trixie-backports/! s/(trixie-updates)/\1 trixie-backports/ }"
        commands = (
            f"sudo sed -i -E '{suites}' /etc/apt/sources.list.d/debian.sources",
            "sudo apt update",
            "sudo apt install -t trixie-backports linux-image-amd64 firmware-amd-graphics",
        )
        return Fix("take kernel and firmware from Debian's backports", commands, "reboot")
    if view.family.name == "fedora" and name not in ("fedora", "bazzite", "nobara"):
        return Fix("no kernel of this distribution is new enough: install Fedora 43 or newer")
    return Fix("install kernel 6.18.4 or newer", upgrade(view), "reboot")


@check(
    "kernel",
    why="without two fixes of the compute driver, torch.cuda.synchronize() hangs with the GPU at"
    " 100 %, or training ends in HSA page faults",
    source=AMD_DOC,
    strix_halo=True,
    outside=("wsl",),
)
def kernel(view: HostView) -> Finding:
    """Compare the kernel with the floor of this distribution."""
    version, is_noble = kernel_version(view.release), _is_noble(view)
    saw = f"{view.release or 'no release'} on {view.distribution} (/proc/sys/kernel/osrelease)"
    if version is None:
        return Finding("unknown", saw, Fix("compare with 6.18.4 by hand", ("uname -r",)))
    floor, is_below = "6.18.4", version[:3] < FLOOR
    if is_noble:
        is_oem = view.release.endswith("-oem")
        floor = "6.14.0-1018" if is_oem else "6.17.0-19 (HWE)"
        is_below = is_below and version < (NOBLE_OEM if is_oem else NOBLE_GENERIC)
    if is_below:
        return Finding("fail", f"{saw}; the floor here is {floor}", _newer_kernel(view))
    if is_noble and version[0] >= 7:
        return Finding(
            "fail",
            saw,
            _newer_kernel(view),
            "kernel 7.0 under Ubuntu 24.04 is an unsupported pair: loading weights was about"
            " 300 times slower, with silent hangs",
            "ROCm/ROCm#6530 (measured)",
        )
    if version[:2] == (6, 19):
        why = "6.19 has had no fixes since 2026-04-22; 7.0.9 trains at the same speed"
        fix = Fix("install a newer kernel", upgrade(view), "reboot")
        return Finding("warn", saw, fix, why, GUIDE)
    return Finding("ok", saw, why=f"at or above the floor, {floor}")


@check(
    "firmware",
    why=f"linux-firmware {BAD_FIRMWARE} makes ROCm unstable or crash on this GPU",
    source="kyuz0/amd-strix-halo-toolboxes: docs/troubleshooting-firmware.md (measured)",
    strix_halo=True,
    outside=("container", "wsl"),
)
def firmware(view: HostView) -> Finding:
    """Check for releases of linux-firmware that break ROCm."""
    family = view.family
    query = family.firmware_query
    dates = re.findall(r"20\d{6}", (view.command(query) if query else None) or "")
    if SUSPECT_FIRMWARE in dates and (kernel_version(view.release) or ())[:2] == SUSPECT_KERNEL:
        say = (
            "go back to linux-firmware 20260622, or start a kernel 7.0 or 7.1: your distribution"
            " keeps the older packages"
        )
        return Finding(
            "warn",
            f"linux-firmware {SUSPECT_FIRMWARE} with kernel {view.release}",
            Fix(say, restart="reboot"),
            "GPU faults were reported with this pair; with linux-firmware 20260622 they ended",
            "noamsto/nix-amd-ai#105, PR #121 (measured)",
        )
    if BAD_FIRMWARE in dates:
        install = {
            "fedora": f"{family.upgrade} linux-firmware amd-gpu-firmware",
            "debian": "sudo apt update && sudo apt install linux-firmware || sudo apt install"
            " firmware-amd-graphics",
        }.get(family.name)
        commands = (install, family.initramfs) if install else upgrade(view)
        say = "install linux-firmware 20260110 or newer (or go back to 20251111)"
        saw = f"linux-firmware {BAD_FIRMWARE} ({query[0]})"
        return Finding("fail", saw, Fix(say, commands, "reboot"))
    if dates:
        return Finding("ok", f"linux-firmware {max(dates)}")
    command = "sudo dmesg | grep -i 'amdgpu.*firmware'"
    fix = Fix(f"look for a date other than {BAD_FIRMWARE}", (command,))
    return Finding("unknown", "the package manager lists no linux-firmware with a date", fix)


@check("swap", source=GUIDE, strix_halo=True, outside=("container",))
def swap(view: HostView) -> Finding:
    """Check for swap, which turns an over-commit into a freeze."""
    rows = [line.split() for line in (view.read("/proc/swaps") or "").splitlines()[1:]]
    areas = {row[0]: int(row[2]) * 1024 for row in rows if len(row) > 2 and row[2].isdigit()}
    disks = [name for name in areas if "zram" not in name]
    saw = ", ".join(f"{name} {format_gib(size)}" for name, size in areas.items()) or "no swap"
    if disks:
        say = "turn it off while training; to keep it off, comment its line out of /etc/fstab"
        return Finding(
            "warn",
            f"{saw} (/proc/swaps)",
            Fix(say, ("sudo swapoff " + shlex.join(disks),)),
            "weights that swap out make the machine unusable for minutes instead of stopping the"
            " run",
        )
    if sum(areas.values()) > LARGEST_ZRAM:
        file = "/etc/systemd/zram-generator.conf"
        command = f"printf '[zram0]\\nzram-size = 8192\\n' | sudo tee {file}"
        return Finding(
            "warn",
            f"{saw} (/proc/swaps)",
            Fix("make it 8 GiB", (command,), "reboot"),
            "compressed pages stay in the same RAM: a large zram only delays the stop, with all"
            " cores busy compressing",
            "https://github.com/systemd/zram-generator",
        )
    return Finding("ok", saw, why="an over-commit shows at once")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSetting:
    """A value below `/proc/sys/vm` that large allocations of the GPU's driver depend on."""

    name: str
    is_wrong: Callable[[int], bool]
    why: str
    say: str
    value: int
    keep: bool = True
    """Set it at every boot, not only now."""
    source: str = GUIDE


SYSCTL = "/etc/sysctl.d/90-strixft.conf"

HUGE_PAGE = 2 * 2**20

KERNEL_SETTINGS = (
    KernelSetting(
        name="min_free_kbytes",
        is_wrong=lambda kib: kib < 2**19,  # half of the 1 GiB that the guide sets
        why="the driver's page pool fails ('page allocation failure: order:0' in ttm_pool_alloc)"
        " although RAM is free",
        say="keep 1 GiB of free pages",
        value=2**20,
    ),
    KernelSetting(
        name="compaction_proactiveness",
        is_wrong=lambda value: value < 20,
        why="without compaction in the background large allocations wait for it",
        say="restore the kernel's default",
        value=20,
    ),
    KernelSetting(
        name="nr_hugepages",
        is_wrong=lambda pages: pages * HUGE_PAGE > GIB,
        why="the pages are set aside: torch and the driver do not use them, and nothing else can",
        say="give them back",
        value=0,
        keep=False,
        source="https://docs.kernel.org/admin-guide/mm/hugetlbpage.html",
    ),
)


@check("reclaim", source=GUIDE, strix_halo=True)
def reclaim(view: HostView) -> Iterator[Finding]:
    """Check free pages, compaction and huge pages."""
    wrong = False
    for row in KERNEL_SETTINGS:
        value = view.read_int(f"/proc/sys/vm/{row.name}")
        if value is not None and row.is_wrong(value):
            wrong, setting = True, f"vm.{row.name} = {row.value}"
            at_boot = (f"echo '{setting}' | sudo tee -a {SYSCTL}", f"sudo sysctl -p {SYSCTL}")
            now = (f"sudo sysctl {setting.replace(' ', '')}",)
            fix = Fix(row.say, at_boot if row.keep else now)
            yield Finding("warn", f"vm.{row.name} = {value}", fix, row.why, row.source)
    file = "/sys/kernel/mm/transparent_hugepage/enabled"
    if "[never]" in (view.read(file) or ""):
        wrong = True
        why = "mapping 100 GiB in pages of 4 KiB is slow, for the CPU and for the GPU"
        fix = Fix("turn them on until the next boot", (f"echo madvise | sudo tee {file}",))
        yield Finding("warn", f"transparent huge pages are off ({file})", fix, why)
    if not wrong:
        why = "the GPU's driver allocates large numbers of pages"
        yield Finding("ok", "vm settings suit large allocations", why=why)


@check("out-of-memory", strix_halo=True, outside=("container",))
def out_of_memory(view: HostView) -> Finding:
    """Check for daemons that end processes before the kernel does."""
    if view.command(("systemctl", "is-active", "systemd-oomd")) == "active":
        return Finding(
            "warn",
            "systemd-oomd is active",
            Fix(
                "turn it off, or run training in a scope that it leaves alone",
                (
                    "sudo systemctl disable --now systemd-oomd.service systemd-oomd.socket",
                    "# or: systemd-run --user --scope -p ManagedOOMPreference=omit strixft run …",
                ),
            ),
            "the GPU's pages are charged to no process group, so it ends the wrong one: the whole"
            " session with JupyterLab in it",
            "ROCm/ROCm#6370 (measured); man systemd.resource-control",
        )
    if view.command(("systemctl", "is-active", "earlyoom")) != "active":
        saw, why = "neither systemd-oomd nor earlyoom is active", "plan, cap and kernel limit a run"
        return Finding("ok", saw, why=why, source="systemctl is-active")
    # its threshold is a share of RAM, 10 % by default
    file = "/etc/default/earlyoom"
    given = re.search(r"-m\s+(\d+)", view.read(file) or "")
    threshold = (view.memory_total or 0) * (int(given[1]) if given else 10) / 100
    reserve = reserve_gib(view) * GIB
    saw = f"earlyoom is active and acts below {format_gib(threshold)} of free RAM"
    source = f"https://github.com/rfjakob/earlyoom; {file}"
    if threshold < reserve:
        why = f"a run leaves {format_gib(reserve)} free, so it does not come to that"
        return Finding("ok", saw, why=why, source=source)
    why = f"a planned run goes down to {format_gib(reserve)} and would be ended"
    edit = f"sudo sed -i -E 's/-m +[0-9]+(,[0-9]+)?/-m 5/' {file}"
    fix = Fix("let it wait until 5 % are left", (edit, "sudo systemctl restart earlyoom"))
    return Finding("warn", saw, fix, why, source)


@check(
    "sleep",
    why="nobody is at the keyboard during a run at night; the GPU's memory does not survive sleep",
    source="systemctl is-enabled sleep.target; gsettings",
    outside=("container", "wsl"),
)
def sleep(view: HostView) -> Finding | None:
    """Check that the machine does not go to sleep, which ends the run."""
    enabled = view.command(("systemctl", "is-enabled", "sleep.target"))
    if not enabled:
        return None
    key = ("org.gnome.settings-daemon.plugins.power", "sleep-inactive-ac-type")
    gnome = view.command(("gsettings", "get", *key)) or ""
    graphical = view.command(("systemctl", "get-default")) == "graphical.target"
    idle = gnome.strip("'") or "unknown"
    saw = f"sleep.target: {enabled}; desktop when idle on mains: {idle}"
    if enabled.startswith("masked") or "nothing" in gnome or not graphical:
        return Finding("ok", saw)
    say = "forbid sleep; or for one run: systemd-inhibit --what=sleep:idle strixft run …"
    targets = "sleep.target suspend.target hibernate.target hybrid-sleep.target"
    return Finding("warn", saw, Fix(say, (f"sudo systemctl mask {targets}",)))


def parameters_by_name(model: str) -> float | None:
    """Return the number of parameters that a model's name states.

    >>> parameters_by_name("meta-llama/Llama-3.3-70B-Instruct"), parameters_by_name("my/model")
    (70000000000.0, None)
    """
    found = re.search(r"(?<![\d.])(\d+(?:\.\d+)?)(B|M)(?![A-Za-z])", model, re.IGNORECASE)
    return float(found[1]) * (1e9 if found[2].upper() == "B" else 1e6) if found else None


def _needed_bytes(view: HostView) -> dict[Path, int]:
    """Return the bytes that a run needs, by folder."""
    runs = workspace() / "runs"
    needed = {runs: SPARE}
    if view.recipe is None:
        return needed
    model = view.recipe.model
    size = round(2 * (parameters_by_name(model) or 0))
    if view.recipe.method == "full":
        needed[runs] += 5 * size  # weights, and a checkpoint with its optimizer state
    home = view.environ.get("HF_HOME") or f"{view.home}/.cache/huggingface"
    cache = Path(view.environ.get("HF_HUB_CACHE") or f"{home}/hub")
    is_local = model.startswith("embedded:") or Path(model).expanduser().is_dir()
    if not is_local and not (cache / f"models--{model.replace('/', '--')}/snapshots").is_dir():
        needed[cache] = size + SPARE
    return needed


@check(
    "disk",
    why="a run that fills the disk stops with half a checkpoint",
    source="size: parameters in the model's name × 2 bytes (derived)",
)
def disk(view: HostView) -> Iterator[Finding]:
    """Check the free space for runs and for models."""
    for folder, needed in _needed_bytes(view).items():
        free = view.free_bytes(folder)
        if free is None:
            continue
        saw = f"{format_gib(free)} free for {folder}, {format_gib(needed)} asked for"
        if free >= needed:
            yield Finding("ok", saw)
        else:
            place = shlex.quote(str(folder.parent))
            commands = (f"du -xh --max-depth=2 {place} | sort -h | tail", "hf cache ls")
            say = "make room, or use another disk: --run-dir for runs, HF_HOME for models"
            yield Finding("fail" if view.recipe else "warn", saw, Fix(say, commands))
