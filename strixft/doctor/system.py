"""Swap, huge pages, reclaim, out-of-memory daemons, sleep: what ends a run in the night."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from strixft.doctor.finding import Finding, Fix
from strixft.doctor.memory import RESERVE_GIB
from strixft.doctor.view import HostView
from strixft.recipe.find import workspace
from strixft.support.units import GIB, format_gib

GUIDE = "h34v3nzc0dex/strix-halo-llm-finetune-guide: README.md (measured)"

SYSCTL = "/etc/sysctl.d/90-strixft.conf"

LEAST_FREE_KIB = 2**19
"""Half of the 1 GiB that the guide sets."""

LARGEST_ZRAM = 16 * GIB


def _swaps(view: HostView) -> list[tuple[str, int]]:
    """Name and bytes of each swap area."""
    rows = [line.split() for line in (view.read("/proc/swaps") or "").splitlines()[1:]]
    return [(row[0], int(row[2]) * 1024) for row in rows if len(row) > 2 and row[2].isdigit()]


def check_swap(view: HostView) -> Iterator[Finding]:
    """Swap turns an over-commit into a freeze."""
    if view.strix_halo is None or view.is_container:
        return
    areas = _swaps(view)
    disks = [name for name, _ in areas if "zram" not in name]
    zram = sum(size for name, size in areas if "zram" in name)
    saw = ", ".join(f"{name} {format_gib(size)}" for name, size in areas) or "no swap"
    if disks:
        yield _swap_on_disk(f"{saw} (/proc/swaps)", disks)
    elif zram > LARGEST_ZRAM:
        yield _large_zram(f"{saw} (/proc/swaps)")
    else:
        yield Finding(status="ok", saw=saw, why="an over-commit is seen at once", source=GUIDE)


def _swap_on_disk(saw: str, disks: list[str]) -> Finding:
    return Finding(
        status="warn",
        saw=saw,
        why="weights that swap out make the machine unusable for minutes instead of stopping the"
        " run",
        fix=Fix(
            "turn it off while training; for good, comment its line out of /etc/fstab",
            ("sudo swapoff " + shlex.join(disks),),
        ),
        source=GUIDE,
    )


def _large_zram(saw: str) -> Finding:
    config = "printf '[zram0]\\nzram-size = 8192\\n' | sudo tee /etc/systemd/zram-generator.conf"
    return Finding(
        status="warn",
        saw=saw,
        why="compressed pages stay in the same RAM: much of it only delays the stop, with all cores"
        " busy compressing",
        fix=Fix("make it 8 GiB", (config,), "reboot"),
        source="https://github.com/systemd/zram-generator",
    )


def _sysctl(name: str, value: int) -> tuple[str, ...]:
    return (f"echo 'vm.{name} = {value}' | sudo tee -a {SYSCTL}", f"sudo sysctl -p {SYSCTL}")


def check_reclaim(view: HostView) -> Iterator[Finding]:
    """Free pages, compaction and huge pages, as the GPU's page allocations need them."""
    if view.strix_halo is None:
        return
    found = [*_min_free(view), *_compaction(view), *_huge_pages(view)]
    yield from found or [
        Finding(status="ok", saw="vm settings suit large allocations", why=GUIDE, source=GUIDE)
    ]


def _min_free(view: HostView) -> Iterator[Finding]:
    value = view.read_int("/proc/sys/vm/min_free_kbytes")
    if value is not None and value < LEAST_FREE_KIB:
        yield Finding(
            status="warn",
            saw=f"vm.min_free_kbytes = {value}",
            why="the driver's page pool fails ('page allocation failure: order:0' in"
            " ttm_pool_alloc) although RAM is free",
            fix=Fix("keep 1 GiB of free pages", _sysctl("min_free_kbytes", 2**20)),
            source=GUIDE,
        )


def _compaction(view: HostView) -> Iterator[Finding]:
    value = view.read_int("/proc/sys/vm/compaction_proactiveness")
    if value is not None and value < 20:
        yield Finding(
            status="warn",
            saw=f"vm.compaction_proactiveness = {value}",
            why="without compaction in the background large allocations wait for it",
            fix=Fix("set the kernel's default", _sysctl("compaction_proactiveness", 20)),
            source=GUIDE,
        )


def _huge_pages(view: HostView) -> Iterator[Finding]:
    thp = "/sys/kernel/mm/transparent_hugepage/enabled"
    if "[never]" in (view.read(thp) or ""):
        yield Finding(
            status="warn",
            saw=f"transparent huge pages are off ({thp})",
            why="mapping 100 GiB in pages of 4 KiB is slow, for the CPU and for the GPU",
            fix=Fix("turn them on until the next start", (f"echo madvise | sudo tee {thp}",)),
            source=GUIDE,
        )
    reserved = view.read_int("/proc/sys/vm/nr_hugepages") or 0
    if 0 < reserved * 2 * 2**20 > GIB:
        yield Finding(
            status="warn",
            saw=f"vm.nr_hugepages = {reserved}: {format_gib(reserved * 2 * 2**20)} set aside",
            why="neither torch nor the driver uses these pages; nobody else can",
            fix=Fix("give them back", ("sudo sysctl vm.nr_hugepages=0",)),
            source="https://docs.kernel.org/admin-guide/mm/hugetlbpage.html",
        )


def _is_active(view: HostView, unit: str) -> bool:
    return view.command(("systemctl", "is-active", unit)) == "active"


def check_oom(view: HostView) -> Iterator[Finding]:
    """Daemons that end processes before the kernel does."""
    if view.strix_halo is None or view.is_container:
        return
    if _is_active(view, "systemd-oomd"):
        yield Finding(
            status="warn",
            saw="systemd-oomd is active",
            why="the GPU's pages are charged to no process group, so it ends the wrong one: the"
            " whole session with JupyterLab in it",
            fix=Fix(
                "turn it off, or run training in a scope it leaves alone",
                (
                    "sudo systemctl disable --now systemd-oomd.service systemd-oomd.socket",
                    "# or: systemd-run --user --scope -p ManagedOOMPreference=omit strixft run …",
                ),
            ),
            source="ROCm/ROCm#6370 (measured); man systemd.resource-control",
        )
    elif _is_active(view, "earlyoom"):
        yield _earlyoom(view)
    else:
        yield Finding(
            status="ok",
            saw="neither systemd-oomd nor earlyoom is active",
            why="the plan, the cap and the kernel are what limits a run",
            source="systemctl is-active",
        )


def _earlyoom(view: HostView) -> Finding:
    """Its threshold is a share of RAM (10 % by default); ours is the reserve."""
    given = re.search(r"-m\s+(\d+)", view.read("/etc/default/earlyoom") or "")
    percent = int(given[1]) if given else 10
    threshold = (view.memory_total or 0) * percent / 100
    reserve = (view.recipe.memory.reserve_gib if view.recipe else RESERVE_GIB) * GIB
    saw = f"earlyoom is active, and acts below {format_gib(threshold)} of free RAM"
    source = "https://github.com/rfjakob/earlyoom; /etc/default/earlyoom"
    if threshold < reserve:
        why = f"a run leaves {format_gib(reserve)} free, so it does not come to that"
        return Finding(status="ok", saw=saw, why=why, source=source)
    args = "s/-m +[0-9]+(,[0-9]+)?/-m 5/"
    return Finding(
        status="warn",
        saw=saw,
        why=f"a planned run goes down to {format_gib(reserve)} and would be ended",
        fix=Fix(
            "let it wait for 5 %",
            (f"sudo sed -i -E '{args}' /etc/default/earlyoom", "sudo systemctl restart earlyoom"),
        ),
        source=source,
    )


def check_sleep(view: HostView) -> Iterator[Finding]:
    """A machine that goes to sleep ends the run."""
    if view.is_container or view.is_wsl:
        return
    enabled = view.command(("systemctl", "is-enabled", "sleep.target"))
    if not enabled:
        return
    gnome = view.command(
        ("gsettings", "get", "org.gnome.settings-daemon.plugins.power", "sleep-inactive-ac-type")
    )
    graphical = view.command(("systemctl", "get-default")) == "graphical.target"
    sleep_inhibited = enabled.startswith("masked") or "nothing" in (gnome or "") or not graphical
    idle = (gnome or "unknown").strip("'")
    saw = f"sleep.target: {enabled}; desktop when idle on mains: {idle}"
    why = "a run of a night sees nobody at the keyboard; the GPU's memory does not survive sleep"
    source = "systemctl is-enabled sleep.target; gsettings"
    if sleep_inhibited:
        yield Finding(status="ok", saw=saw, why=why, source=source)
        return
    targets = "sleep.target suspend.target hibernate.target hybrid-sleep.target"
    yield Finding(
        status="warn",
        saw=saw,
        why=why,
        fix=Fix(
            "forbid sleep; or for one run: systemd-inhibit --what=sleep:idle strixft run …",
            (f"sudo systemctl mask {targets}",),
        ),
        source=source,
    )


SPARE = 10 * GIB
"""Prepared data, checkpoints of an adapter, the report."""

SOURCE = "size: parameters in the model's name × 2 bytes (derived)"


def parameters_by_name(model: str) -> float | None:
    """Parameters of a model as its name says.

    >>> parameters_by_name("meta-llama/Llama-3.3-70B-Instruct"), parameters_by_name("my/model")
    (70000000000.0, None)
    """
    found = re.search(r"(?<![\d.])(\d+(?:\.\d+)?)(B|M)(?![A-Za-z])", model, re.IGNORECASE)
    if found is None:
        return None
    return float(found[1]) * (1e9 if found[2].upper() == "B" else 1e6)


def _cache(view: HostView) -> Path:
    home = view.environ.get("HF_HOME") or f"{view.home}/.cache/huggingface"
    return Path(view.environ.get("HF_HUB_CACHE") or f"{home}/hub")


def _is_here(view: HostView, model: str) -> bool:
    """A folder, the embedded model, or in the hub's cache already."""
    cached = _cache(view) / f"models--{model.replace('/', '--')}" / "snapshots"
    return model.startswith("embedded:") or Path(model).expanduser().is_dir() or cached.is_dir()


def _needed(view: HostView) -> dict[Path, int]:
    """Bytes by folder."""
    runs = workspace() / "runs"
    needed = {runs: SPARE}
    if view.recipe is None:
        return needed
    size = round(2 * (parameters_by_name(view.recipe.model) or 0))
    if view.recipe.method == "full":
        needed[runs] += 5 * size  # weights, and a checkpoint with its optimiser state
    if not _is_here(view, view.recipe.model):
        needed[_cache(view)] = size + SPARE
    return needed


def check_disk(view: HostView) -> Iterator[Finding]:
    """Free space where a run writes and where models are kept."""
    for folder, needed in _needed(view).items():
        free = view.free_bytes(folder)
        if free is None:
            continue
        saw = f"{format_gib(free)} free for {folder}, {format_gib(needed)} asked for"
        why = "a run that finds the disk full stops with half a checkpoint"
        if free >= needed:
            yield Finding(status="ok", saw=saw, why=why, source=SOURCE)
        else:
            yield Finding(
                status="warn" if view.recipe is None else "fail",
                saw=saw,
                why=why,
                fix=Fix(
                    "make room, or use another disk: --run-dir for runs, HF_HOME for models",
                    (
                        f"du -xh --max-depth=2 {shlex.quote(str(folder.parent))} | sort -h | tail",
                        "hf cache ls",
                    ),
                ),
                source=SOURCE,
            )
