"""Everything that a run needs of this machine, tried at once: an error where it is wrong."""

from __future__ import annotations

from strixft.attention import Heads
from strixft.child import Figures
from strixft.errors import HostError
from strixft.hardware import Host
from strixft.methods import BITSANDBYTES, Method
from strixft.probe.ladder import USABLE, attention_tasks, dtype_name, probe_attention
from strixft.probe.measure import Task, measure


def _task(kind: str, host: Host) -> Task:
    return Task(kind, kind, {"device": host.device, "dtype": dtype_name(host)})


def _tasks(heads: Heads, method: Method, host: Host) -> list[Task]:
    found = attention_tasks(heads, host)
    if method.base == "nf4":
        found.append(_task("nf4", host))
    if _chooses_blas(method, host):
        found.append(_task("products", host))
    if _adds_up(method, host):
        found.append(_task("sums", host))
    return found


def _adds_up(method: Method, host: Host) -> bool:
    """Products of adapters are added to those of the base, on a GPU."""
    return host.device == "cuda" and method.adapter != "none"


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


def require_right(heads: Heads, method: Method, host: Host) -> None:
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
        if verdict.rung.name == name and verdict.outcome not in USABLE:
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


def joins_sums(method: Method, host: Host) -> bool:
    """Whether a sum of products is to be one product of joined matrices.

    On another machine than this it is, as less is moved (`strixft.step.joined`); on this one if it
    was tried, is right and is the faster way.

    Args:
        method: How the model is trained.
        host: Where.
    """
    if not host.here or not _adds_up(method, host):
        return True
    figures = measure([_task("sums", host)])["sums"]
    return "problem" not in figures and figures.get("fastest") == "joined"
