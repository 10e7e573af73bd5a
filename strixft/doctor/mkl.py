"""Does MKL take its slow path on this AMD processor, and does a preloaded library change that?

MKL asks a function of its own whether the processor is Intel's, and takes a general path if not,
AVX-512 or not. A small library loaded before it can answer instead. Nothing of this touches a GPU;
and most environments for AMD GPUs have no MKL at all, which is said first.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from strixft.support.disk import cache_folder
from strixft.support.errors import HostError
from strixft.support.units import format_number

__all__ = ["MklCheck", "MklReport", "check_mkl"]


SOURCE = "https://danieldk.eu/Intel-MKL-on-AMD-Zen; docs/strix-halo.md, chapter 3"

LICENCE = (
    "The library holds no code of Intel's: it answers one question inside your own process."
    " Read MKL's licence before you give it to others; strixft ships its source only."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MklReport:
    """What was found, and what to do."""

    processor: Processor
    uses: dict[str, str]
    """BLAS of torch and NumPy."""
    measured: tuple[Measured, ...] = ()
    library: Path | None = None
    says: str
    export: str | None = None
    """The line to type, where it helps."""
    licence: str = LICENCE
    source: str = SOURCE

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        data = asdict(self) | {"library": str(self.library) if self.library else None}
        for row, measured in zip(data["measured"], self.measured, strict=True):
            row |= {"ratio": round(measured.ratio, 3), "helps": measured.helps}
        return data

    def rows(self) -> list[list[str]]:
        """What people see."""
        rows = [["processor", self.processor.name]]
        rows += [[name, f"uses {blas}"] for name, blas in self.uses.items()]
        for row in self.measured:
            rows += [
                [f"{row.target.name}, without", f"{_rate(row.before)}, {row.before.short}"],
                [f"{row.target.name}, with", f"{_rate(row.after)}, {row.after.short}"],
            ]
        return rows


def _rate(gemm: Gemm) -> str:
    return f"{format_number(gemm.gflop_per_s, 1)} GFLOP/s"


def _why_not(processor: Processor, uses: dict[str, str], targets: list[Target]) -> str | None:
    """Why there is nothing to do, or None."""
    if not targets:
        blas = ", ".join(f"{name} uses {found}" for name, found in uses.items()) or "nothing found"
        return (
            f"There is no MKL in this environment ({blas}), so there is nothing to fix. ROCm"
            " builds of torch and NumPy's own wheels use OpenBLAS, which knows this processor."
        )
    if not processor.is_amd:
        return f"MKL takes its fast path on this processor by itself ({processor.vendor})."
    return None


def _advice(measured: tuple[Measured, ...]) -> str:
    best = max(measured, key=lambda row: row.ratio)
    if any(row.helps for row in measured):
        return (
            f"It helps: MKL takes the {best.after.short} path and multiplies {best.ratio:.2f} times"
            " as fast, with the same result. It matters for work on the CPU; training on a GPU does"
            " not change."
        )
    if all(row.before.is_fast for row in measured):
        return "MKL takes a fast path already; there is nothing to fix."
    if all(row.after.is_fast for row in measured):
        return f"MKL takes the fast path with it, and is not faster here ({best.ratio:.2f} times)."
    return "This MKL does not ask the functions that the library answers; it changes nothing."


@dataclass(frozen=True)
class MklCheck:
    """Where to look and where to build; `check_mkl` fills in this machine."""

    prefix: Path = field(default_factory=lambda: Path(sys.prefix))
    root: Path = Path("/")
    folder: Path = field(default_factory=lambda: cache_folder() / "mkl")

    def run(self) -> MklReport:
        """Find, build, measure, advise."""
        processor, targets, uses = read_processor(self.root), find_mkl(self.prefix), find_blas()
        reason = _why_not(processor, uses, targets)
        if reason is not None:
            return MklReport(processor=processor, uses=uses, says=reason)
        library = build_hook(self.folder)
        measured = tuple(
            Measured(target=row, before=measure(row, None), after=measure(row, library))
            for row in targets
        )
        helps = any(row.helps for row in measured)
        return MklReport(
            processor=processor,
            uses=uses,
            measured=measured,
            library=library,
            says=_advice(measured),
            export=f"export LD_PRELOAD={library}${{LD_PRELOAD:+:$LD_PRELOAD}}" if helps else None,
        )


def check_mkl() -> MklReport:
    """This machine, this environment."""
    return MklCheck().run()


HOOK = """\
/* MKL up to 2024 asks mkl_serv_intel_cpu_true() and mkl_serv_intel_cpu().
   MKL from 2025 asks for the function that it will ask. */
static int yes(void) { return 1; }
int mkl_serv_intel_cpu_true(void) { return 1; }
int mkl_serv_intel_cpu(void) { return 1; }
void *mkl_serv_get_cpu_true(void) { return (void *)yes; }
void *mkl_serv_get_cpu(void) { return (void *)yes; }
"""

WORTH_IT = 1.05
"""Less than this is the noise of a shared machine."""


_GEMM = """\
import sys, time
n = 1024
def gflops(multiply):
    multiply()
    times = []
    for _ in range(7):
        began = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times) / 1e9
"""

_WITH_TORCH = (
    _GEMM
    + """\
import torch
torch.manual_seed(0)
a = torch.randn(n, n, dtype=torch.float64)
result = torch.empty_like(a)
rate = gflops(lambda: torch.mm(a, a, out=result))
print("MEASURED", rate, float(result.sum()))
"""
)

_WITH_CTYPES = (
    _GEMM
    + """\
import ctypes
library = ctypes.CDLL(sys.argv[1])
matrix = ctypes.c_double * (n * n)
a, result = matrix(*((i * 7919 % 1000) / 1000 for i in range(n * n))), matrix()
one, zero = ctypes.c_double(1), ctypes.c_double(0)
rate = gflops(lambda: library.cblas_dgemm(101, 111, 111, n, n, n, one, a, n, a, n, zero, result, n))
print("MEASURED", rate, sum(result))
"""
)


@dataclass(frozen=True, slots=True)
class Gemm:
    """A product of 1024³ in float64, and the path that MKL took for it."""

    path: str
    gflop_per_s: float
    checksum: float

    @property
    def is_fast(self) -> bool:
        """MKL names an instruction set instead of "Intel(R) Architecture processors"."""
        return "Architecture processors" not in self.path

    @property
    def short(self) -> str:
        """The path in a word."""
        if not self.is_fast:
            return "general path"
        found = re.search(r"AVX-512|AVX2|AVX", self.path.replace("Extensions 512", "AVX-512"))
        return found[0] if found else self.path or "path unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One MKL without and with the library."""

    target: Target
    before: Gemm
    after: Gemm

    @property
    def ratio(self) -> float:
        """How many times faster."""
        return self.after.gflop_per_s / self.before.gflop_per_s

    @property
    def helps(self) -> bool:
        """The path changed to a faster one, the result did not."""
        scale = max(abs(self.before.checksum), 1.0)
        same = abs(self.after.checksum - self.before.checksum) <= 1e-6 * scale
        changed = self.after.is_fast and not self.before.is_fast
        return changed and same and self.ratio >= WORTH_IT


def build_hook(folder: Path) -> Path:
    """Compile the library into a folder, once per source.

    Raises:
        HostError: There is no C compiler, or it failed.
    """
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    fix = "sudo dnf install gcc | sudo apt install gcc | sudo pacman -S gcc, then: strixft mkl"
    if compiler is None:
        raise HostError("there is no C compiler to build the library with", fix=fix)
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(HOOK.encode()).hexdigest()[:12]
    source, library = folder / f"mkl-{name}.c", folder / f"mkl-{name}.so"
    if not library.is_file():
        source.write_text(HOOK)
        temporary = library.with_suffix(f".{os.getpid()}")
        words = [compiler, "-O2", "-shared", "-fPIC", "-o", str(temporary), str(source)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise HostError(f"{compiler} failed: {done.stderr.strip()[:300]}", fix=fix)
        temporary.replace(library)
    return library


def _child(target: Target) -> list[str]:
    if target.linked == "dynamic":
        return [sys.executable, "-c", _WITH_CTYPES, target.path]
    return [sys.executable, "-c", _WITH_TORCH]


def _path_taken(output: str) -> str:
    """The instruction set in MKL's first verbose line."""
    found = re.search(r"MKL_VERBOSE .*?for Intel\(R\) 64 architecture (.*?), Lnx", output)
    return found[1].strip() if found else ""


def _no_result(target: Target, problem: str) -> HostError:
    return HostError(
        f"a product with {target.path} failed: {problem}",
        fix="pip install --force-reinstall mkl, or leave MKL alone: training does not need it",
    )


def measure(target: Target, preload: Path | None) -> Gemm:
    """Multiply in a child process, with the library loaded first or without.

    Raises:
        HostError: The child did not get to a result.
    """
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    environment |= {"MKL_VERBOSE": "1"} | ({"LD_PRELOAD": str(preload)} if preload else {})
    try:
        done = subprocess.run(
            _child(target),
            capture_output=True,
            text=True,
            env=environment,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _no_result(target, f"no result in {LIMIT_S:g} s") from error
    found = re.search(r"^MEASURED (\S+) (\S+)$", done.stdout, re.MULTILINE)
    if done.returncode or found is None:
        raise _no_result(target, (done.stderr or done.stdout).strip()[-300:])
    return Gemm(_path_taken(done.stdout), float(found[1]), float(found[2]))


FUNCTIONS = (
    "mkl_serv_intel_cpu_true",
    "mkl_serv_intel_cpu",
    "mkl_serv_get_cpu_true",
    "mkl_serv_get_cpu",
)
"""What MKL asks: the first two up to 2024, the last two from 2025 on."""

LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Processor:
    """What `/proc/cpuinfo` says."""

    vendor: str
    name: str
    avx512: bool

    @property
    def is_amd(self) -> bool:
        """MKL's general path is for this one."""
        return self.vendor == "AuthenticAMD"


@dataclass(frozen=True, slots=True)
class Target:
    """One MKL in this environment, and how it is linked."""

    name: str
    path: str
    linked: str
    """`dynamic`: a library of its own; `static in torch`: inside libtorch_cpu."""
    functions: tuple[str, ...]
    """Those of the four that it has."""


def read_processor(root: Path = Path("/")) -> Processor:
    """The processor; empty texts where nothing says."""
    text = (root / "proc/cpuinfo").read_text(errors="replace")

    def value(key: str) -> str:
        found = re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE)
        return found[1].strip() if found else ""

    return Processor(value("vendor_id"), value("model name"), "avx512f" in value("flags").split())


def _functions(path: Path) -> tuple[str, ...]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        return tuple(name for name in FUNCTIONS if data.find(f"\0{name}\0".encode()) >= 0)


def _dynamic(folder: Path) -> Target | None:
    found = sorted(folder.glob("libmkl_rt.so*"))
    if not found:
        return None
    cores = sorted(folder.glob("libmkl_core.so*"))
    functions = _functions(cores[0]) if cores else ()
    return Target("MKL", str(found[-1]), "dynamic", functions)


def _in_torch(prefix: Path) -> Target | None:
    for path in sorted(prefix.glob("lib/python3*/site-packages/torch/lib/libtorch_cpu.so")):
        if functions := _functions(path):
            return Target("torch", str(path), "static in torch", functions)
    return None


def find_mkl(prefix: Path = Path(sys.prefix)) -> list[Target]:
    """Every MKL of an environment: torch's own, the `mkl` wheel's or conda's, oneAPI's."""
    folders = [prefix / "lib", Path("/opt/intel/oneapi/mkl/latest/lib")]
    found = [_in_torch(prefix), *(_dynamic(folder) for folder in folders)]
    return [target for target in found if target is not None]


def _ask(code: str) -> str:
    """What a Python process of its own prints; a crash or a hang there is nothing printed."""
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout


def find_blas() -> dict[str, str]:
    """BLAS of torch and NumPy, as they say themselves, each in a process of its own."""
    torch = re.search(r"BLAS_INFO=(\w+)", _ask("import torch; print(torch.__config__.show())"))
    numpy = _ask(
        "import numpy; print(numpy.show_config(mode='dicts')['Build Dependencies']['blas']['name'])"
    ).strip()
    found = {"torch": torch[1] if torch else "", "numpy": numpy}
    return {name: blas for name, blas in found.items() if blas}
