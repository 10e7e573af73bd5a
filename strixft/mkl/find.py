"""Which processor, which BLAS, and every MKL of an environment."""

from __future__ import annotations

import mmap
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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
