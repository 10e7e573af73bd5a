"""Does MKL take its slow path on this AMD processor, and does a preloaded library change that?

MKL asks a function of its own whether the processor is Intel's, and takes a general path if not,
AVX-512 or not. A small library loaded before it can answer instead. Nothing of this touches a GPU;
and most environments for AMD GPUs have no MKL at all, which is said first.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from strixft.disk import cache_folder
from strixft.mkl.find import Processor, Target, find_blas, find_mkl, read_processor
from strixft.mkl.measure import Gemm, Measured, build_hook, measure
from strixft.units import format_number

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
