"""Which ways of attention a device may use: those that were run there and are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from strixft.attention import RUNGS, Heads, Rung, cannot, is_wanted, known_bad
from strixft.child import Figures
from strixft.errors import HostError
from strixft.hardware import Host
from strixft.model import native_dtype
from strixft.probe.measure import Task, measure

NOISE = 1.1
"""A rung gives way to one that takes this many times less: two runs of the same differ so much."""

Outcome = Literal["right", "slower", "wrong", "raised", "crashed", "timed out", "no way"]
USABLE: tuple[Outcome, ...] = ("right", "slower")
"""Those that compute the right thing, the better first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of one rung on this device."""

    rung: Rung
    outcome: Outcome
    reason: str
    figures: Mapping[str, Any]

    @property
    def milliseconds(self) -> float:
        """Forward and backward."""
        return float(self.figures["forward_ms"] + self.figures["backward_ms"])


def dtype_name(host: Host) -> str:
    """What training computes in on a host, such as `bfloat16`."""
    kind = native_dtype(host.device, bfloat16=host.bfloat16)
    return str(kind).removeprefix("torch.")


def _task(rung: Rung, heads: Heads, host: Host, *, peak: bool) -> Task:
    arguments = {
        "rung": asdict(rung),
        "heads": asdict(heads),
        "device": host.device,
        "dtype": dtype_name(host),
    }
    return Task(rung.name, "attention", arguments, {"peak": peak})


def attention_tasks(heads: Heads, host: Host, *, peak: bool = False) -> list[Task]:
    """One for each rung that is a way for a model on this machine.

    Args:
        heads: What the model needs.
        host: This machine.
        peak: Count the peak of memory on a CPU too.
    """
    rungs = [rung for rung in RUNGS.values() if cannot(rung, heads, host.device) is None]
    rungs.sort(key=lambda rung: rung.kernels is not None)  # torch 2.11 cannot give its own back
    return [_task(rung, heads, host, peak=peak) for rung in rungs]


def _outcome(figures: Figures) -> Outcome:
    if "problem" not in figures:
        return "right"
    if "ended" in figures:
        return "timed out" if figures["ended"] == "timed out" else "crashed"
    return "wrong" if "allowed_error" in figures else "raised"


def _verdict(rung: Rung, heads: Heads, host: Host, figures: Figures | None) -> Verdict:
    if figures is None:
        why = cannot(rung, heads, host.device) or ""
        return Verdict(rung=rung, outcome="no way", reason=why, figures={})
    if "skipped" in figures:
        figures = {**figures, "problem": figures["skipped"]}
    outcome = _outcome(figures)
    reported = known_bad(rung, heads, host.architecture)
    if outcome != "right":
        reason = str(figures["problem"])
    elif reported is not None:
        reason = f"right here, though reported: {reported.what} ({reported.source})"
    else:
        reason = f"error {figures['error']:.2g} of {figures['allowed_error']:.2g} allowed"
    return Verdict(rung=rung, outcome=outcome, reason=reason, figures=figures)


def _beside(verdict: Verdict, later: Sequence[Verdict]) -> Verdict:
    """The same, or `slower` if a later rung does it in less time and keeps no more of it."""
    for other in later:
        if (
            verdict.outcome == other.outcome == "right"
            and verdict.rung.packed == other.rung.packed
            and verdict.rung.keeps_scores >= other.rung.keeps_scores
            and verdict.milliseconds > NOISE * other.milliseconds
        ):
            reason = (
                f"takes {verdict.milliseconds:.3g} ms where"
                f" {other.rung.name} takes {other.milliseconds:.3g}"
            )
            return replace(verdict, outcome="slower", reason=reason)
    return verdict


def probe_attention(
    heads: Heads, host: Host, *, fresh: bool = False, peak: bool = False
) -> list[Verdict]:
    """Run every rung on this machine, unless that is known; a verdict for each, in their order.

    Args:
        heads: What the model needs.
        host: This machine.
        fresh: Measure again.
        peak: Count the peak of memory on a CPU too.
    """
    found = measure(attention_tasks(heads, host, peak=peak), fresh=fresh)
    verdicts = [_verdict(rung, heads, host, found.get(rung.name)) for rung in RUNGS.values()]
    return [_beside(verdict, verdicts[at + 1 :]) for at, verdict in enumerate(verdicts)]


def probed_ladder(heads: Heads, host: Host, *, packing: bool = True) -> list[Rung]:
    """Rungs that are right on this machine, the first to be taken first.

    Args:
        heads: What the model needs.
        host: This machine.
        packing: Whether the recipe wants packed rows.

    Raises:
        HostError: None is.
    """
    verdicts = [v for v in probe_attention(heads, host) if is_wanted(v.rung, packing=packing)]
    usable = [verdict for verdict in verdicts if verdict.outcome in USABLE]
    if usable:
        usable.sort(key=lambda verdict: USABLE.index(verdict.outcome))
        return [verdict.rung for verdict in usable]
    seen = "; ".join(f"{v.rung.name}: {v.reason}" for v in verdicts if v.outcome != "no way")
    raise HostError(
        f"no way to compute attention is right on {host.name} ({seen})",
        fix="strixft doctor   says what is wrong; strixft bench attention   tries again",
    )
