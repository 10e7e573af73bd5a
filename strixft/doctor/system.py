"""Checks of what ends a long run: swap, reclaim, out-of-memory daemons, sleep, a full disk."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from strixft.doctor.finding import Finding, Fix, Status
from strixft.doctor.kernel import FINETUNE_GUIDE
from strixft.doctor.memory import reserve_gib
from strixft.doctor.view import HostView
from strixft.recipe.find import workspace
from strixft.support.units import GIB, format_gib

GUIDE = f"{FINETUNE_GUIDE} (measured)"

LARGEST_ZRAM = 16 * GIB


def check_swap(view: HostView) -> Finding:
    """Check for swap, which turns an over-commit into a freeze."""
    rows = [line.split() for line in (view.read("/proc/swaps") or "").splitlines()[1:]]
    areas = {row[0]: int(row[2]) * 1024 for row in rows if len(row) > 2 and row[2].isdigit()}
    disks = [name for name in areas if "zram" not in name]
    saw = ", ".join(f"{name} {format_gib(size)}" for name, size in areas.items()) or "no swap"
    if disks:
        why = (
            "weights that swap out make the machine unusable for minutes instead of stopping the"
            " run"
        )
        say = "turn it off while training; to keep it off, comment its line out of /etc/fstab"
        fix = Fix(say, ("sudo swapoff " + shlex.join(disks),))
        return Finding("warn", f"{saw} (/proc/swaps)", why, GUIDE, fix)
    if sum(areas.values()) > LARGEST_ZRAM:
        why = (
            "compressed pages stay in the same RAM: a large zram only delays the stop, with all"
            " cores busy compressing"
        )
        file = "/etc/systemd/zram-generator.conf"
        command = f"printf '[zram0]\\nzram-size = 8192\\n' | sudo tee {file}"
        fix = Fix("make it 8 GiB", (command,), "reboot")
        source = "https://github.com/systemd/zram-generator"
        return Finding("warn", f"{saw} (/proc/swaps)", why, source, fix)
    return Finding("ok", saw, "an over-commit shows at once", GUIDE)


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


def check_reclaim(view: HostView) -> Iterator[Finding]:
    """Check free pages, compaction and huge pages."""
    wrong = False
    for row in KERNEL_SETTINGS:
        value = view.read_int(f"/proc/sys/vm/{row.name}")
        if value is not None and row.is_wrong(value):
            wrong, setting = True, f"vm.{row.name} = {row.value}"
            at_boot = (f"echo '{setting}' | sudo tee -a {SYSCTL}", f"sudo sysctl -p {SYSCTL}")
            now = (f"sudo sysctl {setting.replace(' ', '')}",)
            fix = Fix(row.say, at_boot if row.keep else now)
            yield Finding("warn", f"vm.{row.name} = {value}", row.why, row.source, fix)
    file = "/sys/kernel/mm/transparent_hugepage/enabled"
    if "[never]" in (view.read(file) or ""):
        wrong = True
        why = "mapping 100 GiB in pages of 4 KiB is slow, for the CPU and for the GPU"
        fix = Fix("turn them on until the next boot", (f"echo madvise | sudo tee {file}",))
        yield Finding("warn", f"transparent huge pages are off ({file})", why, GUIDE, fix)
    if not wrong:
        why = "the GPU's driver allocates large numbers of pages"
        yield Finding("ok", "vm settings suit large allocations", why, GUIDE)


def check_oom(view: HostView) -> Finding:
    """Check for daemons that end processes before the kernel does."""
    if view.command(("systemctl", "is-active", "systemd-oomd")) == "active":
        return Finding(
            "warn",
            "systemd-oomd is active",
            "the GPU's pages are charged to no process group, so it ends the wrong one: the whole"
            " session with JupyterLab in it",
            "ROCm/ROCm#6370 (measured); man systemd.resource-control",
            Fix(
                "turn it off, or run training in a scope that it leaves alone",
                (
                    "sudo systemctl disable --now systemd-oomd.service systemd-oomd.socket",
                    "# or: systemd-run --user --scope -p ManagedOOMPreference=omit strixft run …",
                ),
            ),
        )
    if view.command(("systemctl", "is-active", "earlyoom")) == "active":
        return _check_earlyoom(view)
    saw = "neither systemd-oomd nor earlyoom is active"
    return Finding("ok", saw, "plan, cap and kernel limit a run", "systemctl is-active")


def _check_earlyoom(view: HostView) -> Finding:
    """Compare its threshold, a share of RAM (10 % by default), with our reserve."""
    file = "/etc/default/earlyoom"
    given = re.search(r"-m\s+(\d+)", view.read(file) or "")
    threshold = (view.memory_total or 0) * (int(given[1]) if given else 10) / 100
    reserve = reserve_gib(view) * GIB
    saw = f"earlyoom is active and acts below {format_gib(threshold)} of free RAM"
    source = f"https://github.com/rfjakob/earlyoom; {file}"
    if threshold < reserve:
        why = f"a run leaves {format_gib(reserve)} free, so it does not come to that"
        return Finding("ok", saw, why, source)
    why = f"a planned run goes down to {format_gib(reserve)} and would be ended"
    edit = f"sudo sed -i -E 's/-m +[0-9]+(,[0-9]+)?/-m 5/' {file}"
    fix = Fix("let it wait until 5 % are left", (edit, "sudo systemctl restart earlyoom"))
    return Finding("warn", saw, why, source, fix)


def check_sleep(view: HostView) -> Finding | None:
    """Check that the machine does not go to sleep, which ends the run."""
    enabled = view.command(("systemctl", "is-enabled", "sleep.target"))
    if not enabled:
        return None
    key = ("org.gnome.settings-daemon.plugins.power", "sleep-inactive-ac-type")
    gnome = view.command(("gsettings", "get", *key)) or ""
    graphical = view.command(("systemctl", "get-default")) == "graphical.target"
    idle = gnome.strip("'") or "unknown"
    saw = f"sleep.target: {enabled}; desktop when idle on mains: {idle}"
    why = "nobody is at the keyboard during a run at night; the GPU's memory does not survive sleep"
    source = "systemctl is-enabled sleep.target; gsettings"
    if enabled.startswith("masked") or "nothing" in gnome or not graphical:
        return Finding("ok", saw, why, source)
    say = "forbid sleep; or for one run: systemd-inhibit --what=sleep:idle strixft run …"
    targets = "sleep.target suspend.target hibernate.target hybrid-sleep.target"
    return Finding("warn", saw, why, source, Fix(say, (f"sudo systemctl mask {targets}",)))


SPARE = 10 * GIB
"""Prepared data, checkpoints of an adapter, the report."""


def parameters_by_name(model: str) -> float | None:
    """Return the number of parameters that a model's name states.

    >>> parameters_by_name("meta-llama/Llama-3.3-70B-Instruct"), parameters_by_name("my/model")
    (70000000000.0, None)
    """
    found = re.search(r"(?<![\d.])(\d+(?:\.\d+)?)(B|M)(?![A-Za-z])", model, re.IGNORECASE)
    if found is None:
        return None
    return float(found[1]) * (1e9 if found[2].upper() == "B" else 1e6)


def _needed_bytes(view: HostView) -> dict[Path, int]:
    """Bytes that a run needs, by folder."""
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


def check_disk(view: HostView) -> Iterator[Finding]:
    """Check the free space for runs and for models."""
    for folder, needed in _needed_bytes(view).items():
        free = view.free_bytes(folder)
        if free is None:
            continue
        saw = f"{format_gib(free)} free for {folder}, {format_gib(needed)} asked for"
        why = "a run that fills the disk stops with half a checkpoint"
        source = "size: parameters in the model's name × 2 bytes (derived)"
        if free >= needed:
            yield Finding("ok", saw, why, source)
        else:
            status: Status = "warn" if view.recipe is None else "fail"
            place = shlex.quote(str(folder.parent))
            commands = (f"du -xh --max-depth=2 {place} | sort -h | tail", "hf cache ls")
            say = "make room, or use another disk: --run-dir for runs, HF_HOME for models"
            yield Finding(status, saw, why, source, Fix(say, commands))
