"""4-bit weights there and back, against their code book written out."""

from __future__ import annotations

import torch
from torch import Tensor

from strixft.probe.attention import allowed_error, judged, largest_error, milliseconds
from strixft.support.child import Figures

CODES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""NF4's sixteen values (arXiv:2305.14314, appendix E)."""

BLOCK = 64
"""Weights that share a scale."""

RELATIVE_ERROR = 0.12
"""NF4 in blocks of 64 leaves 9 to 10 % of a normal variable's length as error (arXiv:2305.14314
gives the codes; measured here on a CPU: 0.092); garbage leaves 100 % and more."""

SCALE_ERROR = 0.02
"""Largest error of a value, in shares of its block's scale: 8 bits of double quantisation leave
0.007, rounding to bf16 0.004 more, and the nearest two codes are 0.08 apart."""

BETWEEN_CODES = 1e-3
"""Share of values that may take the code beside: those in the middle between two."""


def nearest(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return values as NF4 has them, and each value's scale, both of the values' shape."""
    blocks = values.float().view(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    codes = torch.tensor(CODES)
    chosen = (blocks.div(scales).unsqueeze(-1) - codes).abs().argmin(-1)
    shape = values.shape
    return (codes[chosen] * scales).view(shape), scales.expand_as(blocks).reshape(shape)


def round_trip(device: str, dtype: str) -> Figures:
    """Quantise, dequantise, compare: the import alone proves nothing (PR #1885 of bitsandbytes).

    Returns:
        `version`, `relative_error` of the values' length, `other_codes`: the share of values that
        are not the nearest code times their scale; and a `problem` if either is too much.
    """
    from strixft.model.bitsandbytes_import import bitsandbytes as bnb

    values = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    values = values.to(getattr(torch, dtype))
    packed, state = bnb.functional.quantize_4bit(
        values.to(device), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
    )
    found = bnb.functional.dequantize_4bit(packed, state).float().cpu()
    due, scales = nearest(values)
    error = float((found - values.float()).norm() / values.float().norm())
    others = float(((found - due).abs() <= SCALE_ERROR * scales).logical_not().float().mean())
    figures: Figures = {
        "version": bnb.__version__,
        "relative_error": round(error, 4) if error < float("inf") else None,
        "other_codes": others,
    }
    if not error < RELATIVE_ERROR or others > BETWEEN_CODES:  # NaN is not less
        figures["problem"] = (
            f"error {error:.3g} of the values' length, {RELATIVE_ERROR} is due;"
            f" {others:.1%} of them are not the code that is due"
        )
    return figures


LIBRARIES = ("cublas", "cublaslt")
"""torch's names; on ROCm they are rocBLAS and hipBLASLt."""

SIZE = 4096


def measure_products(device: str, dtype: str) -> Figures:
    """Time a weight gradient, dyᵀ·x, by each library, and check it.

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
