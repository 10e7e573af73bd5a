"""Weight gradients by each BLAS library: one of them is reported to be slow (`TRAPS`)."""

from __future__ import annotations

import torch

from strixft.child import Figures
from strixft.probe.numbers import allowed_error, judged, largest_error, milliseconds

LIBRARIES = ("cublas", "cublaslt")
"""torch's names; on ROCm they are rocBLAS and hipBLASLt."""
SIZE = 4096


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
    fastest = min(times, key=lambda name: times[name])
    return {**judged(max(errors), allowed_error(kind, SIZE)), "ms": times, "fastest": fastest}
