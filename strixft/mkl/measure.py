"""Builds the library, and multiplies with it and without it, each in a process of its own."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from strixft.errors import HostError
from strixft.mkl.find import LIMIT_S, Target

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
