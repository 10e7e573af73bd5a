"""The child of `strixft.probe`: `python -m strixft.probe.child TASKS FILE`.

TASKS is JSON: a list of `name`, `kind` (a row of `KINDS`), `arguments` and `more` of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from strixft.probe.attention import measure_backend
from strixft.probe.weights import measure_products, round_trip
from strixft.support.child import Figures, do_steps

KINDS: Mapping[str, Callable[..., Figures]] = {
    "attention": measure_backend,
    "nf4": round_trip,
    "products": measure_products,
}


def main(tasks: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Do every task."""
    if all(task["arguments"]["device"] == "cpu" for task in tasks):
        torch.set_num_threads(1)  # the work is small there; threads would wait for each other
    work = {t["name"]: partial(KINDS[t["kind"]], **t["arguments"], **t["more"]) for t in tasks}
    do_steps(output, work)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
