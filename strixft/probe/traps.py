"""`TRAPS`: what goes wrong on gfx1151 besides attention, each with its source and what tries it.

Known bad cases of attention are in `strixft.attention.rungs`. Nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from strixft.tables import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Trap:
    """Something that is reported to be slow or wrong; only a measurement overrules it."""

    name: str
    what: str
    source: str
    tried_by: str
    """What runs it on this machine."""
    instead: str
    """What training does."""


TRAPS: Table[Trap] = Table(
    "trap",
    Trap(
        name="weight-gradient",
        what="hipBLASLt computes large weight gradients two to four times slower than rocBLAS"
        " (16.4 against 39.9 TFLOPS at 4096³)",
        source="ROCm/TheRock#5314 (measured, confirmed by AMD)",
        tried_by="strixft.probe.products",
        instead="the library that is faster here, where the base is trained",
    ),
    Trap(
        name="fused-head",
        what="TRL's fused head adds up products in float32 (`_addmm_fp32`): it fails with an older"
        " torch for ROCm, and is slow with a newer one",
        source="TRL 1.16: trl/kernels/chunked_logprob.py",
        tried_by="strixft.doctor.probe_child",
        instead="our own chunked head",
    ),
    Trap(
        name="nf4",
        what="a wrong wave size gave garbage for NF4 in blocks of 64, without an error",
        source="bitsandbytes-foundation/bitsandbytes PR #1885, in 0.50",
        tried_by="strixft.probe.nf4",
        instead="an error before anything is loaded",
    ),
)
