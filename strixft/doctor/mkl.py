"""MKL on AMD processors: find its slow path, and measure a preloaded library that changes it.

MKL asks a function of its own whether the processor is Intel's, and takes a general path if not,
with or without AVX-512. A small library loaded first can answer instead. None of this touches a
GPU. Most environments for AMD GPUs have no MKL at all; the report says so first.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from strixft.doctor.host import package_folder
from strixft.support.errors import HostError
from strixft.support.files import cache_folder
from strixft.support.units import format_number

SOURCE = "https://danieldk.eu/Intel-MKL-on-AMD-Zen; docs/strix-halo.md, chapter 3"

LICENCE = (
    "The library contains no code of Intel's: it answers one question inside your own process."
    " Read MKL's licence before you give it to others; strixft ships its source only."
)

FUNCTIONS = (
    "mkl_serv_intel_cpu_true",
    "mkl_serv_intel_cpu",
    "mkl_serv_get_cpu_true",
    "mkl_serv_get_cpu",
)
"""The functions that MKL asks: the first two up to 2024, the last two from 2025 on."""

HOOK = """\
/* MKL up to 2024 asks mkl_serv_intel_cpu_true() and mkl_serv_intel_cpu().
   MKL from 2025 asks for the function that it will ask. */
static int yes(void) { return 1; }
int mkl_serv_intel_cpu_true(void) { return 1; }
int mkl_serv_intel_cpu(void) { return 1; }
void *mkl_serv_get_cpu_true(void) { return (void *)yes; }
void *mkl_serv_get_cpu(void) { return (void *)yes; }
"""

GEMM = """\
import ctypes, sys, time
n = 1024
if sys.argv[1:]:
    library = ctypes.CDLL(sys.argv[1])
    matrix = ctypes.c_double * (n * n)
    a, result = matrix(*((i * 7919 % 1000) / 1000 for i in range(n * n))), matrix()
    one, zero = ctypes.c_double(1), ctypes.c_double(0)
    sizes = (n, n, n, one, a, n, a, n, zero, result, n)
    multiply = lambda: library.cblas_dgemm(101, 111, 111, *sizes)
else:
    import torch
    torch.manual_seed(0)
    a = torch.randn(n, n, dtype=torch.float64)
    result = torch.empty_like(a)
    multiply = lambda: torch.mm(a, a, out=result)
times = []
for _ in range(8):
    began = time.perf_counter()
    multiply()
    times.append(time.perf_counter() - began)
total = sum(result) if sys.argv[1:] else float(result.sum())
print("MEASURED", 2 * n**3 / min(times[1:]) / 1e9, total)
"""
"""Times a product of 1024³ in float64: with the MKL in the argument, or with torch's own."""

WORTH_IT = 1.05
"""Smallest speed-up that counts; less is the noise of a shared machine."""

LIMIT_S = 120.0
"""Time limit of one child process."""


@dataclass(frozen=True, slots=True)
class Processor:
    """The first processor of `/proc/cpuinfo`; empty texts for what it does not say."""

    vendor: str
    name: str
    avx512: bool


@dataclass(frozen=True, slots=True)
class MklLibrary:
    """One MKL in this environment."""

    name: str
    path: str
    linked: str
    """`dynamic`: a library of its own; `static in torch`: inside libtorch_cpu."""
    functions: tuple[str, ...]
    """Those of `FUNCTIONS` that it has."""


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

    def __str__(self) -> str:
        return f"{format_number(self.gflop_per_s, 1)} GFLOP/s, {self.short}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MklComparison:
    """One MKL without and with the preloaded library."""

    target: MklLibrary
    before: Gemm
    after: Gemm

    @property
    def ratio(self) -> float:
        """Speed with the library ÷ speed without."""
        return self.after.gflop_per_s / self.before.gflop_per_s

    @property
    def helps(self) -> bool:
        """The path changed to a faster one, and the result stayed the same."""
        scale = max(abs(self.before.checksum), 1.0)
        same = abs(self.after.checksum - self.before.checksum) <= 1e-6 * scale
        changed = self.after.is_fast and not self.before.is_fast
        return changed and same and self.ratio >= WORTH_IT


@dataclass(frozen=True, slots=True, kw_only=True)
class MklReport:
    """Results and advice."""

    processor: Processor
    uses: dict[str, str]
    """BLAS of torch and NumPy."""
    measured: tuple[MklComparison, ...] = ()
    library: Path | None = None
    says: str
    export: str | None = None
    """The command that preloads the library, where it helps."""
    licence: str = LICENCE
    source: str = SOURCE

    def to_dict(self) -> dict[str, Any]:
        """Return the document that `strixft mkl --json` prints."""
        data = asdict(self) | {"library": str(self.library) if self.library else None}
        for row, measured in zip(data["measured"], self.measured, strict=True):
            row |= {"ratio": round(measured.ratio, 3), "helps": measured.helps}
        return data

    def rows(self) -> list[list[str]]:
        """Return the rows of the table that `strixft mkl` prints."""
        rows = [["processor", self.processor.name]]
        rows += [[name, f"uses {blas}"] for name, blas in self.uses.items()]
        for row in self.measured:
            rows += [[f"{row.target.name}, without", str(row.before)]]
            rows += [[f"{row.target.name}, with", str(row.after)]]
        return rows


def read_processor(root: Path = Path("/")) -> Processor:
    """Read the processor of a host."""
    text = (root / "proc/cpuinfo").read_text(errors="replace")

    def value(key: str) -> str:
        found = re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE)
        return found[1].strip() if found else ""

    return Processor(value("vendor_id"), value("model name"), "avx512f" in value("flags").split())


def _functions(path: Path) -> tuple[str, ...]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        return tuple(name for name in FUNCTIONS if data.find(f"\0{name}\0".encode()) >= 0)


def find_mkl(prefix: Path = Path(sys.prefix)) -> list[MklLibrary]:
    """Find every MKL of an environment: torch's own, the `mkl` wheel's or conda's, oneAPI's."""
    found = []
    torch = package_folder(prefix, "torch", sys.version_info[:2]) / "lib/libtorch_cpu.so"
    if torch.is_file() and (functions := _functions(torch)):
        found.append(MklLibrary("torch", str(torch), "static in torch", functions))
    for folder in (prefix / "lib", Path("/opt/intel/oneapi/mkl/latest/lib")):
        for library in sorted(folder.glob("libmkl_rt.so*"))[-1:]:
            cores = sorted(folder.glob("libmkl_core.so*"))[:1]
            functions = _functions(cores[0]) if cores else ()
            found.append(MklLibrary("MKL", str(library), "dynamic", functions))
    return found


def _run_python(*words: str, **environment: str) -> subprocess.CompletedProcess[str] | None:
    """Run Python in a process of its own, for `-c` and its code; None if it hangs."""
    inherited = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    try:
        return subprocess.run(
            [sys.executable, "-c", *words],
            capture_output=True,
            text=True,
            env=inherited | environment,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None


def find_blas() -> dict[str, str]:
    """Ask torch and NumPy for their BLAS, each in a process of its own."""
    torch = _run_python("import torch; print(torch.__config__.show())")
    numpy = _run_python(
        "import numpy; print(numpy.show_config(mode='dicts')['Build Dependencies']['blas']['name'])"
    )
    names = re.findall(r"BLAS_INFO=(\w+)", torch.stdout) if torch else []
    found = {"torch": names[0] if names else "", "numpy": numpy.stdout.strip() if numpy else ""}
    return {name: blas for name, blas in found.items() if blas}


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


def measure(target: MklLibrary, preload: Path | None) -> Gemm:
    """Multiply in a child process, with or without the library loaded first.

    Raises:
        HostError: The child did not get to a result.
    """
    environment = {"MKL_VERBOSE": "1"} | ({"LD_PRELOAD": str(preload)} if preload else {})
    arguments = (target.path,) if target.linked == "dynamic" else ()
    done = _run_python(GEMM, *arguments, **environment)
    found = re.search(r"^MEASURED (\S+) (\S+)$", done.stdout if done else "", re.MULTILINE)
    if done is None or done.returncode or found is None:
        problem = f"no result in {LIMIT_S:g} s"
        if done is not None:
            problem = (done.stderr or done.stdout).strip()[-300:]
        raise HostError(
            f"a product with {target.path} failed: {problem}",
            fix="pip install --force-reinstall mkl, or leave MKL alone: training does not need it",
        )
    path = re.search(r"MKL_VERBOSE .*?for Intel\(R\) 64 architecture (.*?), Lnx", done.stdout)
    return Gemm(path[1].strip() if path else "", float(found[1]), float(found[2]))


def _advice(measured: tuple[MklComparison, ...]) -> str:
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
        return f"MKL takes the fast path with it but is not faster here ({best.ratio:.2f} times)."
    return "This MKL does not ask the functions that the library answers; it changes nothing."


def check_mkl(
    prefix: Path = Path(sys.prefix), root: Path = Path("/"), folder: Path | None = None
) -> MklReport:
    """Find MKL, build the library, measure both, and advise.

    Args:
        prefix: The Python environment.
        root: Root of the host's `/proc`.
        folder: Place of the library; by default in the cache.
    """
    folder = folder or cache_folder() / "mkl"
    processor, targets, uses = read_processor(root), find_mkl(prefix), find_blas()
    if not targets:
        blas = ", ".join(f"{name} uses {found}" for name, found in uses.items()) or "nothing found"
        says = (
            f"There is no MKL in this environment ({blas}), so there is nothing to fix. ROCm"
            " builds of torch and NumPy's own wheels use OpenBLAS, which knows this processor."
        )
        return MklReport(processor=processor, uses=uses, says=says)
    if processor.vendor != "AuthenticAMD":
        says = f"MKL takes its fast path on this processor by itself ({processor.vendor})."
        return MklReport(processor=processor, uses=uses, says=says)
    library = build_hook(folder)
    measured = tuple(
        MklComparison(target=row, before=measure(row, None), after=measure(row, library))
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
