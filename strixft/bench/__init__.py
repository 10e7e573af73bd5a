"""Measurements that anybody can repeat: `strixft bench WHAT`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from strixft.bench.data import bench_data
from strixft.errors import StrixftError
from strixft.tables import did_you_mean

BENCHES: dict[str, Callable[..., list[dict[str, Any]]]] = {"data": bench_data}
"""What can be measured → how; each gives rows to print side by side."""


def run_bench(what: str, **settings: Any) -> list[dict[str, Any]]:
    """Measure.

    Args:
        what: A row of `BENCHES`.
        **settings: Of that measurement.

    Raises:
        StrixftError: There is no such measurement.
    """
    if what not in BENCHES:
        raise StrixftError(f"there is no bench {what!r}", fix=did_you_mean(what, BENCHES))
    return BENCHES[what](**settings)
