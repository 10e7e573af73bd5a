"""`HOSTS`: memory and rates of a machine, one row each, every number with its source.

`this_host()` reads the machine it runs on. Roots of `/proc` and `/sys` can be given, so that a
recorded machine can be read as well. Below torch: nothing here needs it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sourced:
    """A number with its origin."""

    value: float
    mark: Mark
    source: str


NO_WORKSPACE = Sourced(value=0, mark="derived", source="CPU libraries allocate outside torch")

NOTHING_OUTSIDE = Sourced(value=0, mark="derived", source="a CPU has no context")

HIP_CONTEXT = Sourced(
    value=700 * MIB, mark="measured", source="600–700 MB, unslothai/unsloth commit 300292b2f0"
)

HIP_WORKSPACE = Sourced(
    value=108 * MIB,
    mark="derived",
    source="hipBLAS 32 MiB + hipBLASLt 76 MiB, torch 2.14 ATen/cuda/CublasHandlePool.cpp",
)

CUDA_WORKSPACE = Sourced(
    value=64 * MIB,
    mark="measured",
    source="alive after training beyond all tensors, H200, torch 2.11, dev/LOG.md 2026-11-23",
)

LAUNCH = Sourced(
    value=25.5e-6,
    mark="derived",
    source="time ÷ launches of compiled steps that wait for them, QLoRA and LoRA alike, on an H200,"
    " docs/plan-accuracy.md; not measured on other hosts",
)

UNPACK = Sourced(
    value=0.4,
    mark="derived",
    source="bitsandbytes on an H200, 1.5 ps a weight: what a micro-batch takes whatever its rows,"
    " docs/plan-accuracy.md; not measured on other hosts",
)

COMPILED_UNPACK = Sourced(
    value=0.7,
    mark="measured",
    source="14,336 × 4,096 on an H200, 28,672 × 8,192 has 0.77, docs/performance.md;"
    " not measured on other hosts",
)

GAP = Sourced(
    value=1.25e-6,
    mark="derived",
    source="compiled steps of 2 to 16 rows on an H200, QLoRA and LoRA alike, docs/plan-accuracy.md;"
    " not measured on other hosts",
)

PYTHON = Sourced(
    value=14e-3,
    mark="derived",
    source="LoRA and QLoRA of a 1B, 1 × 1024 tokens, beyond their launches, on an H200:"
    " python dev/small_run.py qlora lora, 2026-11-30; not measured on other hosts",
)

NO_LAUNCH = Sourced(value=0, mark="derived", source="a CPU computes where it launches")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One machine. Bytes, bytes per second and FLOP per second."""

    name: str
    device: Literal["cuda", "cpu"]
    """Device type in torch's terms; a ROCm device is `cuda` too."""
    unified: bool
    """Device memory is the host's own memory, so the host's reserve comes off it."""
    memory_bytes: Sourced
    """What a process may use before the host's reserve is taken off."""
    bfloat16: bool
    """Matrix products in bf16 run at full rate."""
    architecture: str = ""
    """Of the GPU, such as `gfx1151`; empty where nothing depends on it."""
    here: bool = False
    """It is this machine, so what runs on it can be tried before it is used."""
    workspace_bytes: Sourced = NO_WORKSPACE
    """What BLAS keeps inside torch's allocator once it has run."""
    driver_bytes: Sourced | None = None
    """What the driver gives of unified memory; the host's reserve does not come off it."""
    outside_bytes: Sourced = NOTHING_OUTSIDE
    """Device memory that a process takes outside torch's allocator: the context, code objects."""
    bandwidth_bytes_per_s: Sourced | None = None
    matmul_flop_per_s: Mapping[str, Sourced] = field(default_factory=dict)
    """Rate of large square products by dtype."""
    launch_s: Sourced = LAUNCH
    """What an operator takes the processor to launch, Python included."""
    python_s: Sourced = PYTHON
    """What a micro-batch takes the processor besides its launches."""
    unpack_share: Sourced = UNPACK
    """Share of the bandwidth at which 4-bit matrices are written out to be multiplied."""
    compiled_unpack_share: Sourced = COMPILED_UNPACK
    """The same where a compiled layer's own kernel does it."""
    gap_s: Sourced = GAP
    """What passes on the device between the end of one kernel and the work of the next."""
    bus_bytes_per_s: Sourced | None = None
    """What the memory bus can move at most, by its width and clock."""
    peak_flop_per_s: Sourced | None = None
    """What the matrix units can do at most, dense, in 16 bit."""
    quirks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may use, and where that was read."""

    num_bytes: int
    source: str


_GUIDE = "ROCm/TheRock#5314 (4096³, forward layout, hipBLASLt)"

_SPARK = "huggingface/kernels PR #283"

_STRIX_BUS = Sourced(value=256e9, mark="derived", source="256 bit × 8000 MT/s")

_STRIX_PEAK = Sourced(
    value=59.4e12,
    mark="derived",
    source="512 FLOP × 40 CU × 2.9 GHz, lhl/strix-halo-testing: llm-bench/README.md",
)


HOSTS: Table[Host] = Table(
    "host",
    Host(
        name="strix-halo-128",
        device="cuda",
        unified=True,
        memory_bytes=Sourced(
            value=125 * GIB,
            mark="derived",
            source="MemTotal of a 128 GB board with a 0.5 GiB carve-out and GTT raised",
        ),
        bfloat16=True,
        architecture=STRIX_HALO,
        workspace_bytes=HIP_WORKSPACE,
        outside_bytes=HIP_CONTEXT,
        bandwidth_bytes_per_s=Sourced(
            value=212.6e9, mark="measured", source="lhl/strix-halo-testing: hardware-test/README.md"
        ),
        matmul_flop_per_s={
            "bfloat16": Sourced(value=32.4e12, mark="measured", source=_GUIDE),
            "float32": Sourced(value=3.1e12, mark="measured", source="ROCm/ROCm#5807"),
        },
        bus_bytes_per_s=_STRIX_BUS,
        peak_flop_per_s=_STRIX_PEAK,
        quirks=("over-commit can freeze the host instead of raising an error",),
    ),
    Host(
        name="strix-halo-64",
        device="cuda",
        unified=True,
        memory_bytes=Sourced(
            value=62 * GIB,
            mark="derived",
            source="as strix-halo-128, for a 64 GB board",
        ),
        bfloat16=True,
        architecture=STRIX_HALO,
        workspace_bytes=HIP_WORKSPACE,
        outside_bytes=HIP_CONTEXT,
        bandwidth_bytes_per_s=Sourced(
            value=212.6e9, mark="derived", source="same memory bus as strix-halo-128"
        ),
        matmul_flop_per_s={
            "bfloat16": Sourced(value=32.4e12, mark="derived", source="same chip"),
        },
        bus_bytes_per_s=_STRIX_BUS,
        peak_flop_per_s=_STRIX_PEAK,
        quirks=("over-commit can freeze the host instead of raising an error",),
    ),
    Host(
        name="dgx-spark",
        device="cuda",
        unified=True,
        memory_bytes=Sourced(value=121 * GIB, mark="measured", source="JustVugg/colibri#136"),
        bfloat16=True,
        workspace_bytes=CUDA_WORKSPACE,
        bandwidth_bytes_per_s=Sourced(value=218e9, mark="measured", source=_SPARK),
        matmul_flop_per_s={"bfloat16": Sourced(value=92e12, mark="measured", source=_SPARK)},
        bus_bytes_per_s=Sourced(value=273e9, mark="vendor", source="DGX Spark datasheet"),
    ),
    Host(
        name="v100-32",
        device="cuda",
        unified=False,
        memory_bytes=Sourced(value=32510 * MIB, mark="vendor", source="Tesla V100 SXM2 32 GB"),
        bfloat16=False,
        workspace_bytes=CUDA_WORKSPACE,
        bandwidth_bytes_per_s=Sourced(value=900e9, mark="vendor", source="V100 datasheet"),
        matmul_flop_per_s={
            "float16": Sourced(value=95e12, mark="measured", source="lablup/mlxcel#1654"),
            "float32": Sourced(value=14e12, mark="measured", source="lablup/mlxcel#1654"),
        },
        bus_bytes_per_s=Sourced(value=900e9, mark="vendor", source="V100 datasheet"),
        peak_flop_per_s=Sourced(value=125e12, mark="vendor", source="V100 datasheet"),
        quirks=("no bf16 in hardware: fp16 with loss scaling",),
    ),
    Host(
        name="h100-80",
        device="cuda",
        unified=False,
        memory_bytes=Sourced(
            value=81559 * MIB, mark="measured", source="nvidia-smi, H100 80GB HBM3"
        ),
        bfloat16=True,
        workspace_bytes=CUDA_WORKSPACE,
        bandwidth_bytes_per_s=Sourced(value=3.35e12, mark="vendor", source="H100 SXM datasheet"),
        matmul_flop_per_s={
            "bfloat16": Sourced(value=680e12, mark="derived", source="as an H200, the same chip")
        },
        bus_bytes_per_s=Sourced(value=3.35e12, mark="vendor", source="H100 SXM datasheet"),
        peak_flop_per_s=Sourced(value=989e12, mark="vendor", source="H100 SXM datasheet"),
    ),
    Host(
        name="h200-141",
        device="cuda",
        unified=False,
        memory_bytes=Sourced(value=143771 * MIB, mark="measured", source="nvidia-smi, H200"),
        bfloat16=True,
        workspace_bytes=CUDA_WORKSPACE,
        bandwidth_bytes_per_s=Sourced(
            value=4.25e12, mark="measured", source="strixft bench bandwidth, torch 2.11"
        ),
        matmul_flop_per_s={
            "bfloat16": Sourced(
                value=680e12,
                mark="measured",
                source="strixft bench gemm, 8192³, torch 2.11: 664 to 697 on five cards at 700 W",
            )
        },
        bus_bytes_per_s=Sourced(value=4.8e12, mark="vendor", source="H200 datasheet"),
        peak_flop_per_s=Sourced(value=989e12, mark="vendor", source="H200 datasheet"),
    ),
)


THIS_MACHINE = ("auto", "cpu")
"""Names that stand for this machine, and for its CPU alone."""


def known_host(name: str) -> str:
    """A host's name, if there is such a host.

    Raises:
        RecipeError: There is none.
    """
    names = [*THIS_MACHINE, *HOSTS]
    if name not in names:
        raise RecipeError(f"there is no host {name!r}", fix=did_you_mean(name, names))
    return name


def budget(host: Host, reserve_gib: float) -> Budget:
    """What a run may use on a host: its memory, less the reserve where memory is shared.

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
    """`/proc/meminfo` in bytes; lines that hold no number of KiB are left out.

    Raises:
        HostError: There is none.
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
    """A small file of the kernel; empty where it is absent or unreadable."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _read_int(path: Path) -> int | None:
    text = _read_text(path)
    return int(text) if text.isdecimal() and text.isascii() else None  # "max" is no number


_CGROUPS = {
    "": ("", "memory.max", "memory.current", ""),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}
"""By controller, as `/proc/self/cgroup` has it: folder, limit, use, prefix in `memory.stat`."""


def _cgroup_left(root: Path) -> tuple[int, Path] | None:
    """What the tightest limit on this process leaves it, and the file with that limit.

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
    """What the limit of one control group leaves; nothing where it has none.

    Files in the page cache count as used, and are dropped before anything is killed.
    """
    most, used = _read_int(folder / limit), _read_int(folder / current)
    if most is None or used is None:
        return []
    stat = _read_text(folder / "memory.stat")
    files = re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", stat, re.MULTILINE)
    return [(max(0, most - max(0, used - sum(map(int, files)))), folder / limit)]


def available_host_memory(root: Path = Path("/")) -> Sourced:
    """What the kernel says a new process could still take, or a control group's limit leaves.

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
        return Sourced(value=left[0], mark="read here", source=source)
    return Sourced(value=available, mark="read here", source="MemAvailable of /proc/meminfo")


def _amd_cards(root: Path) -> list[Path]:
    devices = (root / "sys/class/drm").glob("card*/device")
    amd = [device for device in devices if _read_text(device / "vendor") == AMD_VENDOR]
    return sorted(amd, key=lambda device: (len(device.parent.name), device.parent.name))


@dataclass(frozen=True, slots=True)
class AmdCard:
    """One AMD display device and its memory, in bytes; None where a file cannot be read."""

    folder: Path
    device_id: str
    """PCI device, such as `0x1586`."""
    gtt_total: int | None
    gtt_used: int | None
    vram_total: int | None
    vram_used: int | None

    @property
    def is_strix_halo(self) -> bool:
        """The GPU of a Strix Halo chip, gfx1151."""
        return self.device_id == STRIX_HALO_DEVICE


def read_amd_cards(root: Path = Path("/")) -> list[AmdCard]:
    """AMD display devices in the order of their numbers."""
    names = ("gtt_total", "gtt_used", "vram_total", "vram_used")
    return [
        AmdCard(
            folder,
            _read_text(folder / "device"),
            *(_read_int(folder / f"mem_info_{name}") for name in names),
        )
        for folder in _amd_cards(root)
    ]


def amd_memory(root: Path = Path("/")) -> tuple[Sourced, bool] | None:
    """Free device memory of the first AMD card, and whether it is the host's own memory.

    GTT larger than VRAM: the driver places device memory in GTT (kernel commit 759e764), which is
    system memory. Otherwise it is the VRAM carve-out, which the host does not see.
    """
    for device in _amd_cards(root):
        names = ("gtt_total", "gtt_used", "vram_total", "vram_used")
        read = {name: _read_int(device / f"mem_info_{name}") for name in names}
        if any(value is None for value in read.values()):
            continue
        gtt, gtt_used, vram, vram_used = (read[name] or 0 for name in names)
        if vram >= gtt:
            source = f"{device}/mem_info_vram_total − used"
            return Sourced(value=vram - vram_used, mark="read here", source=source), False
        source = f"{device}/mem_info_gtt_total − used"
        return Sourced(value=gtt - gtt_used, mark="read here", source=source), True
    return None


def this_host(root: Path = Path("/"), *, device: str = "cpu") -> Host:
    """The machine this runs on, read now.

    Args:
        root: Where `/proc` and `/sys` are found.
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
