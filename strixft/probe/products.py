"""Products that a device may be better at in one way than in another.

Weight gradients by each BLAS library: one of them is reported to be slow (`TRAPS`). Sums of two
products as compiled layers have them: added up, or as one (`strixft.step.joined`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from strixft.child import Figures
from strixft.probe.numbers import allowed_error, judged, largest_error, milliseconds

LIBRARIES = ("cublas", "cublaslt")
"""torch's names; on ROCm they are rocBLAS and hipBLASLt."""
SIZE = 4096
TOKENS, RANK = 16_384, 16
"""Of a step, and of an adapter."""


def _figures(times: dict[str, float], error: float, allowed: float) -> Figures:
    fastest = min(times, key=lambda name: times[name])
    return {**judged(error, allowed), "ms": times, "fastest": fastest}


def measure_products(device: str, dtype: str) -> Figures:
    """Time of a weight gradient, dyᵀ·x, by each library, and whether it is right.

    Args:
        device: `cuda`.
        dtype: Such as `bfloat16`.

    Returns:
        `ms` by library, the `fastest`, `error` of the worse one; and a `problem` if it is wrong.
    """
    kind, times, errors = getattr(torch, dtype), dict[str, float](), list[float]()
    generator = torch.Generator().manual_seed(0)
    gradient, inputs = (
        torch.randn(SIZE, SIZE, generator=generator).to(kind).to(device) for _ in range(2)
    )
    due = gradient[:, :64].double().cpu().T @ inputs.double().cpu()
    for library in LIBRARIES:
        try:
            torch.backends.cuda.preferred_blas_library(library)
        except RuntimeError:  # not in this build
            continue
        errors.append(largest_error([(gradient.T @ inputs)[:64]], [due]))
        times[library] = milliseconds(lambda: gradient.T @ inputs, device)
    return _figures(times, max(errors), allowed_error(kind, SIZE))


def measure_sums(device: str, dtype: str) -> Figures:
    """Time of x·Wᵀ + z·Bᵀ, added up and as one product, and whether that is right.

    Args:
        device: `cuda`.
        dtype: Such as `bfloat16`.

    Returns:
        `ms` by way, the `fastest`, `error` of the worse one; and a `problem` if it is wrong.
    """
    kind, depth, generator = getattr(torch, dtype), SIZE + RANK, torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(rows, SIZE + 4 * RANK, generator=generator).to(kind).to(device)[:, :depth]
        for rows in (TOKENS, SIZE)
    )
    x, z, w, b = (part.contiguous() for m in (left, right) for part in m.split([SIZE, RANK], 1))

    def added() -> Tensor:
        total: Tensor = z @ b.T
        return total.addmm_(x, w.T)

    def joined() -> Tensor:
        left[:, SIZE:].copy_(z)
        total: Tensor = left @ right.T
        return total

    due = left[:64].double().cpu() @ right.double().cpu().T
    error = max(largest_error([way()[:64]], [due]) for way in (added, joined))
    times = {way.__name__: milliseconds(way, device) for way in (added, joined)}
    return _figures(times, error, allowed_error(kind, depth))
