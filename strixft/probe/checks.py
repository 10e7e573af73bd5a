"""Attention, 4-bit weights and BLAS: what ran on this device and is right may be used there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from strixft.attention.backends import (
    BACKENDS,
    AttentionBackend,
    Heads,
    cannot,
    is_wanted,
    known_bad,
)
from strixft.catalog.hosts import Host
from strixft.catalog.methods import BITSANDBYTES, Method
from strixft.model.architecture import architecture_of, sample_layers
from strixft.model.kernels import GROUPED
from strixft.model.load import native_dtype
from strixft.probe.layers import plain_config
from strixft.probe.run import Task, measure, measure_here
from strixft.support.child import Figures
from strixft.support.errors import HostError

NOISE = 1.1
"""A backend gives way to one that is this many times faster: two runs of one differ by as much."""

Outcome = Literal["right", "slower", "wrong", "raised", "crashed", "timed out", "unsupported"]

USABLE: tuple[Outcome, ...] = ("right", "slower")
"""Outcomes that compute the right thing, the better first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of one attention backend on this device."""

    backend: AttentionBackend
    outcome: Outcome
    reason: str
    figures: Mapping[str, Any]

    @property
    def milliseconds(self) -> float:
        """Time of forward and backward."""
        return float(self.figures["forward_ms"] + self.figures["backward_ms"])


def dtype_name(host: Host) -> str:
    """Return the type that training computes in on a host, such as `bfloat16`."""
    kind = native_dtype(host.device, bfloat16=host.bfloat16)
    return str(kind).removeprefix("torch.")


def _task(kind: str, host: Host) -> Task:
    return Task(kind, kind, {"device": host.device, "dtype": dtype_name(host)})


def _attention_tasks(
    heads: Heads, host: Host, names: Collection[str], *, peak: bool = False
) -> list[Task]:
    """Return tasks of the named backends that this machine supports for a model."""
    found = [b for b in BACKENDS.values() if b.name in names and not cannot(b, heads, host.device)]
    found.sort(key=lambda b: b.kernels is not None)  # torch 2.11 cannot give its own back
    shared = _task("attention", host).arguments | {"heads": asdict(heads)}
    return [
        Task(b.name, "attention", {"backend": asdict(b), **shared}, {"peak": peak}) for b in found
    ]


def _verdict(
    backend: AttentionBackend, heads: Heads, host: Host, figures: Figures | None
) -> Verdict:
    def verdict(outcome: Outcome, reason: object) -> Verdict:
        return Verdict(backend=backend, outcome=outcome, reason=str(reason), figures=figures or {})

    if figures is None:
        return verdict("unsupported", cannot(backend, heads, host.device) or "")
    problem = figures.get("problem", figures.get("skipped"))
    if "ended" in figures:
        return verdict("timed out" if figures["ended"] == "timed out" else "crashed", problem)
    if problem is not None:
        return verdict("wrong" if "allowed_error" in figures else "raised", problem)
    if reported := known_bad(backend, heads, host.architecture):
        what = f"{reported.what} ({reported.source})"
        return verdict("right", f"right here, though reported: {what}")
    error = f"error {figures['error']:.2g} of {figures['allowed_error']:.2g} allowed"
    return verdict("right", error)


def _beside(verdict: Verdict, later: Sequence[Verdict]) -> Verdict:
    """Return a verdict, or `slower` if a later backend is faster and keeps no more memory."""
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
    heads: Heads,
    host: Host,
    names: Collection[str] = tuple(BACKENDS),
    *,
    fresh: bool = False,
    peak: bool = False,
) -> list[Verdict]:
    """Run attention backends on this machine, unless their figures are known.

    Args:
        heads: Attention heads of the model.
        host: This machine.
        names: Backends to run; the verdicts are in the order of `BACKENDS`.
        fresh: Run again those whose figures are known.
        peak: Count the peak of memory on a CPU too.
    """
    found = measure(_attention_tasks(heads, host, names, peak=peak), fresh=fresh)
    named = [backend for backend in BACKENDS.values() if backend.name in names]
    verdicts = [_verdict(backend, heads, host, found.get(backend.name)) for backend in named]
    return [_beside(verdict, verdicts[at + 1 :]) for at, verdict in enumerate(verdicts)]


def _choosable(
    heads: Heads, host: Host, asked: str, *, packing: bool
) -> tuple[list[str], list[str]]:
    """Names of backends to try first, and of all that can be chosen.

    A backend that keeps the scores of every head gives way to all that are right, so it need not be
    tried beside others.
    """
    found = [
        backend
        for backend in BACKENDS.values()
        if asked in ("auto", backend.name) and is_wanted(backend, packing=packing)
    ]
    lean = [b.name for b in found if not (b.keeps_scores or cannot(b, heads, host.device))]
    every = [backend.name for backend in found]
    return (lean, every) if lean else (every, every)


def usable(verdicts: Sequence[Verdict]) -> list[AttentionBackend]:
    """Return the backends that are right on this machine, the first to be taken first."""
    found = [verdict for verdict in verdicts if verdict.outcome in USABLE]
    found.sort(key=lambda verdict: USABLE.index(verdict.outcome))
    return [verdict.backend for verdict in found]


def choose_attention(
    heads: Heads, host: Host, asked: str = "auto", *, packing: bool = True
) -> list[Verdict]:
    """Try the attention backends that can be chosen on this machine, and no others.

    Args:
        heads: Attention heads of the model.
        host: This machine.
        asked: A row of `BACKENDS`, or `auto` for any.
        packing: Documents may share a row.

    Raises:
        HostError: Any would do, and none is right.
    """
    first, every = _choosable(heads, host, asked, packing=packing)
    verdicts = probe_attention(heads, host, first)
    if not usable(verdicts) and first != every:
        verdicts = probe_attention(heads, host, every)
    if usable(verdicts) or asked != "auto":
        return verdicts
    seen = "; ".join(
        f"{v.backend.name}: {v.reason}" for v in verdicts if v.outcome != "unsupported"
    )
    raise HostError(
        f"no attention backend is right on {host.name} ({seen})",
        fix="strixft doctor   says what is wrong; strixft bench attention   tries again",
    )


@dataclass(frozen=True, slots=True)
class LayersProof:
    """Faults that a trial of an architecture's layers found on this device."""

    leaks: Mapping[str, str] = field(default_factory=dict)
    """Attention with which documents of a row are not kept apart, and the reason."""
    bad_kernels: Mapping[str, str] = field(default_factory=dict)
    """Packages whose kernels are wrong, and the reason."""


def heads_here(config: Any) -> Heads:
    """Return a model's heads on this machine.

    Where a package has kernels for its states, documents may share a row: that is tried.
    """
    found = architecture_of(config)
    return replace(found.heads, carries_state=found.heads.carries_state and not found.kernels)


def _try_layers(
    config: Any, backend: AttentionBackend, host: Host, off: Collection[str]
) -> str | None:
    """Return the problem of an architecture's layers with a backend, without some kernels."""
    architecture = architecture_of(config)
    arguments = {
        "config": plain_config(config),
        "layers": sample_layers(architecture.kinds),
        "backend": asdict(backend),
        "kernels": architecture.kernels,
        "off": sorted(off),
    }
    shared = _task("layers", host).arguments
    task = Task(f"layers with {backend.name}", "layers", {**shared, **arguments})
    if host.device == "cpu" and not architecture.kernels:
        figures = measure_here(task)
    else:
        figures = measure([task])[task.name]
    problem: str | None = figures.get("problem")
    return problem


def _try_grouped(sides: Sequence[tuple[int, int]], host: Host) -> str | None:
    """Return the problem of the grouped product in the sizes of a model's experts."""
    if not sides or host.device == "cpu":  # there it is one product an expert
        return None
    shared = _task("experts", host).arguments
    task = Task("grouped products", "experts", {**shared, "sides": [list(one) for one in sides]})
    figures = measure([task])[task.name]
    problem: str | None = figures.get("problem")
    return problem


def find_bad_kernels(config: Any, host: Host) -> dict[str, str]:
    """Try the kernels that a model takes from packages, those of one package at a time."""
    architecture, found = architecture_of(config), {}
    packages = architecture.kernels
    if problem := _try_grouped(architecture.routed, host):
        found[GROUPED] = problem
    for package in packages:
        others = [other for other in packages if other != package]
        if problem := _try_layers(config, BACKENDS["eager-rows"], host, others):
            found[package] = problem
    return found


def prove_layers(config: Any, host: Host, backends: Sequence[AttentionBackend]) -> LayersProof:
    """Try an architecture's layers on this machine: kernels, then documents that share rows.

    Args:
        config: The model's configuration.
        host: This machine.
        backends: Attention that is right here, the first to be taken first.
    """
    packed = [backend for backend in backends if backend.packed]
    bad, leaks = find_bad_kernels(config, host), dict[str, str]()
    for backend in packed:
        if (problem := _try_layers(config, backend, host, bad)) is None:
            break
        leaks[backend.name] = problem
        if architecture_of(config).heads.carries_state:  # whatever the attention
            leaks |= {other.name: problem for other in packed}
            break
    return LayersProof(leaks, bad)


def _chooses_blas(method: Method, host: Host) -> bool:
    """Large weight gradients: where the base is trained, on a GPU."""
    return host.device == "cuda" and method.adapter == "none"


def require_device_works(
    heads: Heads, method: Method, host: Host, asked: str = "auto", *, packing: bool = True
) -> list[Verdict]:
    """Try all that a run needs of this machine, in one child process, unless that is known.

    Arguments and verdicts are those of `choose_attention`.

    Raises:
        HostError: 4-bit weights do not come back as they should, or no attention is right.
    """
    tasks = _attention_tasks(heads, host, _choosable(heads, host, asked, packing=packing)[0])
    if method.base == "nf4":
        tasks.append(_task("nf4", host))
    if _chooses_blas(method, host):
        tasks.append(_task("products", host))
    nf4 = measure(tasks).get("nf4", {})
    problem = nf4.get("problem", nf4.get("skipped"))
    if problem is not None:
        raise HostError(
            f"4-bit weights are wrong on {host.name}: {problem}",
            fix=f'pip install "{BITSANDBYTES}"   and start Python again;'
            " until then: --set method=lora",
        )
    return choose_attention(heads, host, asked, packing=packing)


def fastest_blas(method: Method, host: Host) -> str | None:
    """Return the BLAS library that is fastest at large weight gradients.

    None where the method computes none, or no library is right.
    """
    if not _chooses_blas(method, host):
        return None
    figures = measure([_task("products", host)])["products"]
    return None if "problem" in figures else figures.get("fastest")
