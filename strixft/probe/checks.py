"""Which ways of attention a device may use: those that were run there and are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from strixft.attention.backends import (
    BACKENDS,
    AttentionBackend,
    Heads,
    cannot,
    is_wanted,
    known_backends,
    known_bad,
)
from strixft.catalog.hosts import Host
from strixft.catalog.methods import BITSANDBYTES, Method
from strixft.model.architecture import architecture_of
from strixft.model.load import native_dtype
from strixft.probe.run import Task, measure
from strixft.recipe.schema import Recipe
from strixft.step.update import StepOptions
from strixft.support.child import Figures
from strixft.support.errors import HostError, RecipeError
from strixft.support.tables import Table

NOISE = 1.1
"""A rung gives way to one that takes this many times less: two runs of the same differ so much."""


Outcome = Literal["right", "slower", "wrong", "raised", "crashed", "timed out", "no way"]

USABLE: tuple[Outcome, ...] = ("right", "slower")
"""Those that compute the right thing, the better first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of one rung on this device."""

    backend: AttentionBackend
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


def _attention_task(backend: AttentionBackend, heads: Heads, host: Host, *, peak: bool) -> Task:
    arguments = {
        "backend": asdict(backend),
        "heads": asdict(heads),
        "device": host.device,
        "dtype": dtype_name(host),
    }
    return Task(backend.name, "attention", arguments, {"peak": peak})


def attention_tasks(heads: Heads, host: Host, *, peak: bool = False) -> list[Task]:
    """One for each rung that is a way for a model on this machine.

    Args:
        heads: What the model needs.
        host: This machine.
        peak: Count the peak of memory on a CPU too.
    """
    backends = [
        backend for backend in BACKENDS.values() if cannot(backend, heads, host.device) is None
    ]
    backends.sort(
        key=lambda backend: backend.kernels is not None
    )  # torch 2.11 cannot give its own back
    return [_attention_task(backend, heads, host, peak=peak) for backend in backends]


def _outcome(figures: Figures) -> Outcome:
    if "problem" not in figures:
        return "right"
    if "ended" in figures:
        return "timed out" if figures["ended"] == "timed out" else "crashed"
    return "wrong" if "allowed_error" in figures else "raised"


def _verdict(
    backend: AttentionBackend, heads: Heads, host: Host, figures: Figures | None
) -> Verdict:
    if figures is None:
        why = cannot(backend, heads, host.device) or ""
        return Verdict(backend=backend, outcome="no way", reason=why, figures={})
    if "skipped" in figures:
        figures = {**figures, "problem": figures["skipped"]}
    outcome = _outcome(figures)
    reported = known_bad(backend, heads, host.architecture)
    if outcome != "right":
        reason = str(figures["problem"])
    elif reported is not None:
        reason = f"right here, though reported: {reported.what} ({reported.source})"
    else:
        reason = f"error {figures['error']:.2g} of {figures['allowed_error']:.2g} allowed"
    return Verdict(backend=backend, outcome=outcome, reason=reason, figures=figures)


def _beside(verdict: Verdict, later: Sequence[Verdict]) -> Verdict:
    """The same, or `slower` if a later rung does it in less time and keeps no more of it."""
    for other in later:
        if (
            verdict.outcome == other.outcome == "right"
            and verdict.backend.packed == other.backend.packed
            and verdict.backend.keeps_scores >= other.backend.keeps_scores
            and verdict.milliseconds > NOISE * other.milliseconds
        ):
            reason = (
                f"takes {verdict.milliseconds:.3g} ms where"
                f" {other.backend.name} takes {other.milliseconds:.3g}"
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
    verdicts = [
        _verdict(backend, heads, host, found.get(backend.name)) for backend in BACKENDS.values()
    ]
    return [_beside(verdict, verdicts[at + 1 :]) for at, verdict in enumerate(verdicts)]


def probed_backends(heads: Heads, host: Host, *, packing: bool = True) -> list[AttentionBackend]:
    """Rungs that are right on this machine, the first to be taken first.

    Args:
        heads: What the model needs.
        host: This machine.
        packing: Whether the recipe wants packed rows.

    Raises:
        HostError: None is.
    """
    verdicts = [v for v in probe_attention(heads, host) if is_wanted(v.backend, packing=packing)]
    usable = [verdict for verdict in verdicts if verdict.outcome in USABLE]
    if usable:
        usable.sort(key=lambda verdict: USABLE.index(verdict.outcome))
        return [verdict.backend for verdict in usable]
    seen = "; ".join(f"{v.backend.name}: {v.reason}" for v in verdicts if v.outcome != "no way")
    raise HostError(
        f"no way to compute attention is right on {host.name} ({seen})",
        fix="strixft doctor   says what is wrong; strixft bench attention   tries again",
    )


def _task(kind: str, host: Host) -> Task:
    return Task(kind, kind, {"device": host.device, "dtype": dtype_name(host)})


def _tasks(heads: Heads, method: Method, host: Host) -> list[Task]:
    found = attention_tasks(heads, host)
    if method.base == "nf4":
        found.append(_task("nf4", host))
    if _chooses_blas(method, host):
        found.append(_task("products", host))
    return found


def _chooses_blas(method: Method, host: Host) -> bool:
    """Large weight gradients: where the base is trained, on a GPU."""
    return host.device == "cuda" and method.adapter == "none"


def _require_nf4(host: Host) -> None:
    figures: Figures = measure([_task("nf4", host)])["nf4"]
    problem = figures.get("problem", figures.get("skipped"))
    if problem is not None:
        raise HostError(
            f"4-bit weights are wrong on {host.name}: {problem}",
            fix=f'pip install "{BITSANDBYTES}"   and start Python again;'
            " until then: --set method=lora",
        )


def require_device_works(heads: Heads, method: Method, host: Host) -> None:
    """Try what a run needs of this machine, unless that is known.

    Args:
        heads: What the model needs.
        method: How it is trained.
        host: This machine.

    Raises:
        HostError: 4-bit weights do not come back as they should.
    """
    measure(_tasks(heads, method, host))  # in one child
    if method.base == "nf4":
        _require_nf4(host)


def require_attention(name: str, heads: Heads, host: Host, plan_again: str) -> None:
    """Refuse a plan whose attention is not right on this machine.

    Args:
        name: The rung that it chose.
        heads: What the model needs.
        host: This machine.
        plan_again: What to type for another plan.

    Raises:
        HostError: It is wrong here.
    """
    for verdict in probe_attention(heads, host):
        if verdict.backend.name == name and verdict.outcome not in USABLE:
            raise HostError(
                f"attention {name!r}, which the plan chose, cannot be used on {host.name}:"
                f" {verdict.reason}",
                fix=plan_again,
            )


def fastest_blas(method: Method, host: Host) -> str | None:
    """The BLAS library that is fastest at large weight gradients; None where that is no question.

    Args:
        method: How the model is trained.
        host: This machine.
    """
    if not _chooses_blas(method, host):
        return None
    figures = measure([_task("products", host)])["products"]
    return None if "problem" in figures else figures.get("fastest")


def _backends(heads: Heads, host: Host, *, packing: bool) -> list[AttentionBackend]:
    """Ways of attention: those that are right on this machine, or by the table of another one."""
    if host.here:
        return probed_backends(heads, host, packing=packing)
    return known_backends(heads, host.device, host.architecture, packing=packing)


def _no_choice(name: str, heads: Heads, host: Host) -> RecipeError:
    verdicts = probe_attention(heads, host) if host.here else []
    reasons = "".join(f": {v.reason}" for v in verdicts if v.backend.name == name)
    return RecipeError(
        f"attention {name!r} cannot train {heads.model_type} on {host.name}{reasons}",
        fix="--set train.attention=auto",
    )


def step_options_for(
    recipe: Recipe, config: Any, host: Host, *, recomputed_layers: int = 0
) -> StepOptions:
    """The fastest way that nothing speaks against, or the one the recipe names.

    Args:
        recipe: May name the attention, and whether to compile.
        config: The model's configuration.
        host: Where it runs.
        recomputed_layers: Layers whose activations are not kept.

    Raises:
        RecipeError: The attention that it names is no choice there.
        HostError: No attention is right on this machine.
    """
    train, on_gpu = recipe.train, host.device == "cuda"
    heads = architecture_of(config).heads
    found = _backends(heads, host, packing=recipe.dataset.packing)
    if train.attention != "auto":
        found = [backend for backend in found if backend.name == train.attention]
    if not found:
        raise _no_choice(train.attention, heads, host)
    one_length = found[0].packed  # each other length is compiled for itself
    compiled = on_gpu and one_length if train.compile == "auto" else train.compile == "layers"
    return StepOptions(
        attention=found[0].name,
        compiled=compiled,
        recomputed_layers=recomputed_layers,
        elementwise=(compiled and train.recompute != "none") or train.recompute == "elementwise",
    )


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


KNOWN_ISSUES: Table[Trap] = Table(
    "trap",
    Trap(
        name="weight-gradient",
        what="hipBLASLt computes large weight gradients two to four times slower than rocBLAS"
        " (16.4 against 39.9 TFLOPS at 4096³)",
        source="ROCm/TheRock#5314 (measured, confirmed by AMD)",
        tried_by="strixft.probe.weights",
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
        tried_by="strixft.probe.weights",
        instead="an error before anything is loaded",
    ),
)
