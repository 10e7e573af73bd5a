"""`HOSTS`: memory and rates of a machine, one row each, every number with its source.

`this_host()` reads this machine. The root of `/proc` and `/sys` can be given, so that a recorded
machine can be read as well. Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from strixft.support.errors import FitError, HostError, RecipeError
from strixft.support.tables import Table, did_you_mean
from strixft.support.units import GIB, MIB, format_gib

Mark = Literal["measured", "vendor", "derived", "read here"]

AMD_VENDOR = "0x1002"

STRIX_HALO = "gfx1151"
"""Architecture of its GPU, in the terms of ROCm."""

STRIX_HALO_DEVICE = "0x1586"
"""PCI device of Radeon 8060S, 8050S and 8040S (Niko1221/Strata: docs/STRIX_HALO.md)."""


@dataclass(frozen=True, slots=True)
class Sourced:
    """A number with its origin."""

    value: float
    mark: Mark
    source: str


HIP_CONTEXT = Sourced(700 * MIB, "measured", "600–700 MB, unslothai/unsloth commit 300292b2f0")

HIP_WORKSPACE = Sourced(
    108 * MIB,
    "derived",
    "hipBLAS 32 MiB + hipBLASLt 76 MiB, torch 2.14 ATen/cuda/CublasHandlePool.cpp",
)

CUDA_WORKSPACE = Sourced(
    64 * MIB,
    "measured",
    "alive after training beyond all tensors, H200, torch 2.11, dev/LOG.md 2026-11-23",
)

NO_LAUNCH = Sourced(0, "derived", "a CPU computes where it launches")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One machine. Bytes, bytes per second and FLOP per second."""

    name: str
    device: Literal["cuda", "cpu"]
    """Device type in torch's terms; a ROCm device is `cuda` too."""
    unified: bool
    """Device memory is the host's own memory, so the host's reserve is subtracted from it."""
    memory_bytes: Sourced
    """Memory that a process may use before the host's reserve is subtracted."""
    bfloat16: bool
    """Matrix products in bf16 run at full rate."""
    architecture: str = ""
    """Architecture of the GPU, such as `gfx1151`; empty if nothing depends on it."""
    here: bool = False
    """It is this machine, so everything can be tried on it before it is used."""
    workspace_bytes: Sourced = Sourced(0, "derived", "CPU libraries allocate outside torch")
    """Memory that BLAS keeps inside torch's allocator once it has run."""
    driver_bytes: Sourced | None = None
    """Unified memory that the driver gives; the host's reserve is not subtracted from it."""
    outside_bytes: Sourced = Sourced(0, "derived", "a CPU has no context")
    """Device memory that a process takes outside torch's allocator: the context, code objects."""
    bandwidth_bytes_per_s: Sourced | None = None
    matmul_flop_per_s: Mapping[str, Sourced] = field(default_factory=dict)
    """Rate of large square products by dtype."""
    launch_s: Sourced = Sourced(
        25.5e-6,
        "derived",
        "time ÷ launches of compiled steps that wait for them, QLoRA and LoRA alike, on an H200,"
        " docs/plan-accuracy.md; not measured on other hosts",
    )
    """Processor time to launch an operator, Python included."""
    python_s: Sourced = Sourced(
        14e-3,
        "derived",
        "LoRA and QLoRA of a 1B, 1 × 1024 tokens, beyond their launches, on an H200:"
        " python dev/small_run.py qlora lora, 2026-11-30; not measured on other hosts",
    )
    """Processor time of a micro-batch besides its launches."""
    unpack_share: Sourced = Sourced(
        0.4,
        "derived",
        "bitsandbytes on an H200, 1.5 ps a weight, in any micro-batch whatever its rows,"
        " docs/plan-accuracy.md; not measured on other hosts",
    )
    """Share of the bandwidth at which 4-bit matrices are written out to be multiplied."""
    compiled_unpack_share: Sourced = Sourced(
        0.7,
        "measured",
        "14,336 × 4,096 on an H200, 28,672 × 8,192 has 0.77, docs/performance.md;"
        " not measured on other hosts",
    )
    """The same share for the kernel of a compiled layer."""
    gap_s: Sourced = Sourced(
        1.25e-6,
        "derived",
        "compiled steps of 2 to 16 rows on an H200, QLoRA and LoRA alike, docs/plan-accuracy.md;"
        " not measured on other hosts",
    )
    """Time on the device between the end of one kernel and the work of the next."""
    bus_bytes_per_s: Sourced | None = None
    """Most that the memory bus can move, by its width and clock."""
    peak_flop_per_s: Sourced | None = None
    """Most that the matrix units can do, dense, in 16 bit."""
    quirks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory that a run may use, and its origin."""

    num_bytes: int
    source: str


_SPARK = "huggingface/kernels PR #283"

_STRIX_HALO_128 = Host(
    name="strix-halo-128",
    device="cuda",
    unified=True,
    memory_bytes=Sourced(
        125 * GIB, "derived", "MemTotal of a 128 GB board with a 0.5 GiB carve-out and GTT raised"
    ),
    bfloat16=True,
    architecture=STRIX_HALO,
    workspace_bytes=HIP_WORKSPACE,
    outside_bytes=HIP_CONTEXT,
    bandwidth_bytes_per_s=Sourced(
        212.6e9, "measured", "lhl/strix-halo-testing: hardware-test/README.md"
    ),
    matmul_flop_per_s={
        "bfloat16": Sourced(
            32.4e12, "measured", "ROCm/TheRock#5314 (4096³, forward layout, hipBLASLt)"
        ),
        "float32": Sourced(3.1e12, "measured", "ROCm/ROCm#5807"),
    },
    bus_bytes_per_s=Sourced(256e9, "derived", "256 bit × 8000 MT/s"),
    peak_flop_per_s=Sourced(
        59.4e12,
        "derived",
        "512 FLOP × 40 CU × 2.9 GHz, lhl/strix-halo-testing: llm-bench/README.md",
    ),
    quirks=("over-commit can freeze the host instead of raising an error",),
)

_H200 = Host(
    name="h200-141",
    device="cuda",
    unified=False,
    memory_bytes=Sourced(143771 * MIB, "measured", "nvidia-smi, H200"),
    bfloat16=True,
    workspace_bytes=CUDA_WORKSPACE,
    bandwidth_bytes_per_s=Sourced(4.25e12, "measured", "strixft bench bandwidth, torch 2.11"),
    matmul_flop_per_s={
        "bfloat16": Sourced(
            680e12,
            "measured",
            "strixft bench gemm, 8192³, torch 2.11: 664 to 697 on five cards at 700 W",
        )
    },
    bus_bytes_per_s=Sourced(4.8e12, "vendor", "H200 datasheet"),
    peak_flop_per_s=Sourced(989e12, "vendor", "H200 datasheet"),
)

HOSTS: Table[Host] = Table(
    "host",
    _STRIX_HALO_128,
    replace(
        _STRIX_HALO_128,
        name="strix-halo-64",
        memory_bytes=Sourced(62 * GIB, "derived", "as strix-halo-128, for a 64 GB board"),
        bandwidth_bytes_per_s=Sourced(212.6e9, "derived", "same memory bus as strix-halo-128"),
        matmul_flop_per_s={"bfloat16": Sourced(32.4e12, "derived", "same chip")},
    ),
    Host(
        name="dgx-spark",
        device="cuda",
        unified=True,
        memory_bytes=Sourced(121 * GIB, "measured", "JustVugg/colibri#136"),
        bfloat16=True,
        workspace_bytes=CUDA_WORKSPACE,
        bandwidth_bytes_per_s=Sourced(218e9, "measured", _SPARK),
        matmul_flop_per_s={"bfloat16": Sourced(92e12, "measured", _SPARK)},
        bus_bytes_per_s=Sourced(273e9, "vendor", "DGX Spark datasheet"),
    ),
    Host(
        name="v100-32",
        device="cuda",
        unified=False,
        memory_bytes=Sourced(32510 * MIB, "vendor", "Tesla V100 SXM2 32 GB"),
        bfloat16=False,
        workspace_bytes=CUDA_WORKSPACE,
        bandwidth_bytes_per_s=Sourced(900e9, "vendor", "V100 datasheet"),
        matmul_flop_per_s={
            "float16": Sourced(95e12, "measured", "lablup/mlxcel#1654"),
            "float32": Sourced(14e12, "measured", "lablup/mlxcel#1654"),
        },
        bus_bytes_per_s=Sourced(900e9, "vendor", "V100 datasheet"),
        peak_flop_per_s=Sourced(125e12, "vendor", "V100 datasheet"),
        quirks=("no bf16 in hardware: fp16 with loss scaling",),
    ),
    replace(
        _H200,
        name="h100-80",
        memory_bytes=Sourced(81559 * MIB, "measured", "nvidia-smi, H100 80GB HBM3"),
        bandwidth_bytes_per_s=Sourced(3.35e12, "vendor", "H100 SXM datasheet"),
        matmul_flop_per_s={"bfloat16": Sourced(680e12, "derived", "as an H200, the same chip")},
        bus_bytes_per_s=Sourced(3.35e12, "vendor", "H100 SXM datasheet"),
        peak_flop_per_s=Sourced(989e12, "vendor", "H100 SXM datasheet"),
    ),
    _H200,
)

THIS_MACHINE = ("auto", "cpu")
"""Names that stand for this machine, and for its CPU alone."""


def known_host(name: str) -> str:
    """Return a host's name after checking that the host exists.

    Raises:
        RecipeError: There is no such host.
    """
    names = [*THIS_MACHINE, *HOSTS]
    if name not in names:
        raise RecipeError(f"there is no host {name!r}", fix=did_you_mean(name, names))
    return name


def budget(host: Host, reserve_gib: float) -> Budget:
    """Return the memory that a run may use: the host's, less the reserve if memory is unified.

    Raises:
        FitError: Nothing is left.
    """
    memory, driver = host.memory_bytes, host.driver_bytes
    reserve = round(reserve_gib * GIB) if host.unified else 0
    left = int(memory.value) - reserve
    source = f"{memory.source} ({memory.mark})"
    if reserve:
        source += f", less {reserve_gib:g} GiB for the host"
    if driver is not None and driver.value < left:
        left, source = int(driver.value), f"{driver.source} ({driver.mark})"
    if left <= 0:
        fix = "close other programs"
        if reserve >= memory.value > 0:
            fix += f", or --set memory.reserve_gib={memory.value / 4 / GIB:.1f}"
        raise FitError(
            f"{host.name} has nothing left for a run: {format_gib(left)} by {source}", fix=fix
        )
    return Budget(left, source)


def read_meminfo(root: Path = Path("/")) -> dict[str, int]:
    """Return `/proc/meminfo` in bytes, without lines that have no number of KiB.

    Raises:
        HostError: The file cannot be read.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError as error:
        raise HostError(
            f"{root / 'proc/meminfo'} cannot be read: {error.strerror}",
            fix="run it on Linux, where /proc is mounted",
        ) from error
    found = (re.fullmatch(r"(\S+):\s*(\d+) kB", line) for line in lines)
    return {match[1]: int(match[2]) * 1024 for match in found if match}


def _read_text(path: Path) -> str:
    """Return a small file of the kernel, or an empty text if it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def read_int(path: Path) -> int | None:
    """Return the number in a small file of the kernel; None if there is none."""
    text = _read_text(path)
    return int(text) if text.isdecimal() and text.isascii() else None  # not "max"


_CGROUPS = {
    "": ("", "memory.max", "memory.current", ""),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}
"""Controller in `/proc/self/cgroup` → folder, files with limit and use, prefix in `memory.stat`."""


def _cgroup_left(root: Path) -> tuple[int, Path] | None:
    """Return the bytes that the tightest limit on this process leaves, and the file with the limit.

    A limit on any control group above the process's own holds for it too.
    """
    lines = _read_text(root / "proc/self/cgroup").splitlines() or ["0::/"]
    found = []
    for line in lines:
        controller, _, group = line.partition(":")[2].partition(":")
        if controller in _CGROUPS:
            folder, *names = _CGROUPS[controller]
            place = Path(folder, group.strip("/"))
            for one in (place, *place.parents):
                found += _left_in(root / "sys/fs/cgroup" / one, *names)
    return min(found, default=None)


def _left_in(folder: Path, limit: str, current: str, prefix: str) -> list[tuple[int, Path]]:
    """Return the bytes that the limit of a control group leaves; empty if it has no limit.

    Files in the page cache count as used, but are dropped before anything is killed.
    """
    most, used = read_int(folder / limit), read_int(folder / current)
    if most is None or used is None:
        return []
    stat = _read_text(folder / "memory.stat")
    files = re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", stat, re.MULTILINE)
    return [(max(0, most - max(0, used - sum(map(int, files)))), folder / limit)]


def available_host_memory(root: Path = Path("/")) -> Sourced:
    """Return the memory that a new process could take, by the kernel or a control group's limit.

    Raises:
        HostError: The kernel does not say.
    """
    available = read_meminfo(root).get("MemAvailable")
    if available is None:
        raise HostError(
            f"{root / 'proc/meminfo'} has no MemAvailable",
            fix="plan for a host by its name: --set memory.host=strix-halo-128",
        )
    left = _cgroup_left(root)
    if left is not None and left[0] < available:
        source = f"/{left[1].relative_to(root)} less what is used beside cached files"
        return Sourced(left[0], "read here", source)
    return Sourced(available, "read here", "MemAvailable of /proc/meminfo")


@dataclass(frozen=True, slots=True)
class AmdCard:
    """One AMD display device and its memory, in bytes; None if a file cannot be read."""

    folder: Path
    device_id: str
    """PCI device, such as `0x1586`."""
    gtt_total: int | None
    gtt_used: int | None
    vram_total: int | None
    vram_used: int | None

    @property
    def is_strix_halo(self) -> bool:
        """True for the GPU of a Strix Halo chip, gfx1151."""
        return self.device_id == STRIX_HALO_DEVICE


def read_amd_cards(root: Path = Path("/")) -> list[AmdCard]:
    """Return the AMD display devices in the order of their numbers."""
    devices = (root / "sys/class/drm").glob("card*/device")
    amd = [device for device in devices if _read_text(device / "vendor") == AMD_VENDOR]
    amd.sort(key=lambda device: (len(device.parent.name), device.parent.name))
    names = ("gtt_total", "gtt_used", "vram_total", "vram_used")
    return [
        AmdCard(
            device,
            _read_text(device / "device"),
            *(read_int(device / f"mem_info_{name}") for name in names),
        )
        for device in amd
    ]


def amd_memory(root: Path = Path("/")) -> tuple[Sourced, bool] | None:
    """Return the free device memory of the first AMD card, and whether it is the host's memory.

    If GTT is larger than VRAM, the driver places device memory in GTT (kernel commit 759e764),
    which is system memory. Otherwise it is the VRAM carve-out, which the host does not see.
    """
    for card in read_amd_cards(root):
        gtt, gtt_used, vram, vram_used = (
            card.gtt_total, card.gtt_used, card.vram_total, card.vram_used
        )  # fmt: skip
        if gtt is None or gtt_used is None or vram is None or vram_used is None:
            continue
        unified = vram < gtt
        source = f"{card.folder}/mem_info_{'gtt' if unified else 'vram'}_total − used"
        free = gtt - gtt_used if unified else vram - vram_used
        return Sourced(free, "read here", source), unified
    return None


def this_host(root: Path = Path("/"), *, device: str = "cpu") -> Host:
    """Read this machine.

    Args:
        root: Folder that holds `/proc` and `/sys`.
        device: Device type that torch offers, `cuda` or `cpu`; this module does not ask torch.
    """
    if device == "cuda" and (found := amd_memory(root)) is not None:
        driver, unified = found
        return Host(
            name="auto",
            device="cuda",
            unified=unified,
            memory_bytes=available_host_memory(root) if unified else driver,
            driver_bytes=driver if unified else None,
            bfloat16=True,
            workspace_bytes=HIP_WORKSPACE,
            outside_bytes=HIP_CONTEXT,
        )
    return Host(
        name="cpu",
        device="cpu",
        unified=True,
        memory_bytes=available_host_memory(root),
        bfloat16=False,
        launch_s=NO_LAUNCH,
        python_s=NO_LAUNCH,
        gap_s=NO_LAUNCH,
    )
