"""Rooflines: what memory and matrix units allow at most, and verdicts on figures by them.

Making a token reads each active weight once, so tokens/s ≤ bytes/s of the bus ÷ bytes read
(doi:10.1145/1498765.1498785). A figure above that is wrong, whoever says it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from strixft.hardware import Host

Verdict = Literal["plausible", "impossible", "too_low", "does_not_fit"]
TOO_LOW = 0.15
"""Share of the ceiling under which a figure is doubtful: a wrong setting, or a wrong number."""
SLACK = 1.5
"""A limit that was only measured may be passed by this much: another program may do better."""
FLOP_PER_TOKEN = {"full": 6, "adapter": 4, "forward": 2}
"""Per parameter: forward 2, gradient of inputs 2, of weights 2 where they are trained."""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The highest rate that can be true, and what it costs to make a token."""

    tok_per_s: float
    limit_per_s: float
    """Bytes or FLOP that the machine does in a second."""
    per_token: float
    unit: Literal["GB", "TFLOP"]
    theory: bool = True
    """The limit is the chip's own; otherwise one that was measured."""

    def share(self, tok_per_s: float) -> float:
        """Of the ceiling; above 1 it cannot be true."""
        return tok_per_s / self.tok_per_s

    def arithmetic(self, tok_per_s: float | None) -> str:
        """The division in words, and what the figure would need."""
        scale = 1e9 if self.unit == "GB" else 1e12
        text = (
            f"{self.limit_per_s / scale:.4g} {self.unit}/s ÷ {self.per_token / scale:.3g}"
            f" {self.unit} = {self.tok_per_s:,.3g} tokens/s"
        )
        if tok_per_s is None:
            return text
        needed = tok_per_s * self.per_token / scale
        return f"{text}; {tok_per_s:,g} needs {needed:,.4g} {self.unit}/s"


def decode_ceiling(host: Host, bytes_per_token: float) -> Ceiling | None:
    """Of generation; None where nothing is known of the host's memory.

    Args:
        host: Whose bus, else whose measured bandwidth.
        bytes_per_token: Weights read, and the cache at the depth in question.
    """
    limit = host.bus_bytes_per_s or host.bandwidth_bytes_per_s
    if limit is None:
        return None
    theory = host.bus_bytes_per_s is not None
    return Ceiling(limit.value / bytes_per_token, limit.value, bytes_per_token, "GB", theory)


def compute_ceiling(host: Host, parameters: float, flop_per_parameter: float) -> Ceiling | None:
    """Of reading prompts, or of training; None where nothing is known of the matrix units.

    Args:
        host: Whose peak, else whose best measured rate.
        parameters: Those that take part in a token.
        flop_per_parameter: A value of `FLOP_PER_TOKEN`.
    """
    peak, flop = host.peak_flop_per_s, parameters * flop_per_parameter
    rates = [peak] if peak else list(host.matmul_flop_per_s.values())
    if not rates:
        return None
    limit = max(rate.value for rate in rates)
    return Ceiling(limit / flop, limit, flop, "TFLOP", peak is not None)


def judge(tok_per_s: float | None, ceiling: Ceiling, *, fits: bool = True) -> Verdict:
    """What a figure is worth.

    A low figure is doubtful only where memory sets the limit; how much of a chip's matrix rate
    prompts and training reach differs too much.

    Args:
        tok_per_s: The figure; None where it does not run.
        ceiling: Of this model on this host.
        fits: All weights go into the host's memory.
    """
    if tok_per_s is None or not fits:
        return "does_not_fit"
    share = ceiling.share(tok_per_s)
    if share > (1 if ceiling.theory else SLACK):
        return "impossible"
    return "too_low" if share < TOO_LOW and ceiling.unit == "GB" else "plausible"
