"""Measurements that anybody can repeat: `strixft bench WHAT`.

A bench is a function `bench_<name>` of the module `strixft.bench.<name>` that returns rows, and a
row of `BENCHES`. Its parameters become options of the command line, its docstring their help.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from strixft.bench.options import bind, settings_of
from strixft.bench.result import Measured, Row, describe_host
from strixft.support.tables import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One thing that can be measured."""

    name: str
    says: str
    """One line for `strixft bench --help`."""
    rates: bool = False
    """It measures what planning uses: `--host-row`."""

    @property
    def measure(self) -> Callable[..., list[Row]]:
        """The function, imported when it is asked for."""
        module = importlib.import_module(f"strixft.bench.{self.name}")
        function: Callable[..., list[Row]] = getattr(module, f"bench_{self.name}")
        return function


BENCHES: Table[Bench] = Table(
    "bench",
    Bench(name="gemm", says="matrix products in the layouts of training", rates=True),
    Bench(name="bandwidth", says="what the memory moves", rates=True),
    Bench(name="attention", says="the ways of attention: right or not, and their time"),
    Bench(name="train", says="the training step, beside its plan and the product rate"),
    Bench(name="prefill", says="reading prompts: a model in process, or a server's"),
    Bench(name="decode", says="generating: a model in process, or a server's"),
    Bench(name="image", says="a server's images, seconds each"),
    Bench(name="data", says="preparing data, beside TRL's own way"),
)
"""What can be measured."""


def _device(rows: list[Row]) -> dict[str, Any]:
    """The device that did the work: a server's, or this machine's."""
    from strixft.bench.device import device_label
    from strixft.guard.host import device_type

    servers = {row["server"] for row in rows if row.get("server")}
    if servers:
        return describe_host("server", ", ".join(sorted(servers)))
    return describe_host(device_type(), device_label())


def run_bench(what: str, *, save: bool = True, **settings: Any) -> Measured:
    """Measure, and append what was found to the local store.

    Args:
        what: A row of `BENCHES`.
        save: Append it.
        **settings: Of that bench.

    Raises:
        RecipeError: There is no such bench, or it has no such setting.
        HostError: Results cannot be kept.
    """
    from strixft.bench.conditions import reader, watched
    from strixft.bench.store import append, require_store
    from strixft.guard.host import device_type
    from strixft.support.files import now, versions

    measure, started, clock = BENCHES[what].measure, now(), time.monotonic()
    arguments = bind(measure, settings)
    if save:
        require_store()
    with watched(reader(device_type())) as conditions:
        rows = measure(**arguments)
    result = Measured(
        bench=what,
        started=started,
        seconds=round(time.monotonic() - clock, 3),
        host=_device(rows),
        versions=versions(),
        settings={s.name: settings.get(s.name, s.default) for s in settings_of(measure)},
        conditions=conditions,
        rows=rows,
    )
    if save:
        append(result)
    return result
