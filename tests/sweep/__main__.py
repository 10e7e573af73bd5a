"""Every architecture through every stage: `python -m sweep [NAME …]` in `tests/`; `make sweep`.

Outcomes are kept in a file, one a line; `--resume` goes on with the types that it lacks. The page
is written once no type is missing; the exit status is the number of types not as they should be.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"

Found = dict[str, Any]
"""An `Outcome`, and `seconds` of a processor."""


def _run(name: str, gguf: bool, log: Path) -> Found:
    """Take one type through the stages; what libraries print goes to a file."""
    from sweep.models import SWEPT
    from sweep.run import sweep

    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    warnings.filterwarnings("ignore")  # of the reference, too
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        found = sweep(name, SWEPT[name], Path(folder), gguf=gguf)
    return asdict(found) | {"seconds": round(time.monotonic() - began, 1)}


def _tried_here(tasks: Sequence[Any], *, fresh: bool = False) -> dict[str, Any]:
    """Try attention in this process: a child for each type would import torch anew."""
    from strixft.model.config import first_lines
    from strixft.probe.run import measure_here

    found: dict[str, Any] = {}
    for task in tasks:
        try:
            found[task.name] = measure_here(task)
        except Exception as error:  # as a child tells it
            found[task.name] = {"problem": first_lines(error)}
    return found


def outcomes(names: Sequence[str], *, gguf: bool, log: Path) -> Iterator[Found]:
    """Run types side by side, one for each core, and yield what became of them."""
    import strixft
    import sweep.run  # noqa: F401
    from strixft.probe import checks

    checks.measure = _tried_here  # type: ignore[attr-defined]
    cores = len(os.sched_getaffinity(0))
    for name in strixft.__all__:
        getattr(strixft, name)  # imported before the fork, once for all
    gc.freeze()  # what is imported is never looked through again
    with ProcessPoolExecutor(cores, get_context("fork")) as pool:
        for done in as_completed([pool.submit(_run, name, gguf, log) for name in names]):
            yield done.result()


def read(path: Path) -> dict[str, Found]:
    """The outcomes so far, by type; of several the last."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {found["name"]: found for found in map(json.loads, lines)}


def main() -> int:
    """Run the types, and write the page if all are there."""
    parser = argparse.ArgumentParser(prog="python -m sweep")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "sweep.jsonl")
    parser.add_argument("--gguf", action="store_true", help="convert to GGUF and compare too")
    parser.add_argument("--resume", action="store_true", help="only types without an outcome")
    asked = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    from sweep.models import SWEPT
    from sweep.page import write_page
    from sweep.run import Outcome, verdict

    began, bad = time.monotonic(), 0
    if not (asked.names or asked.resume):
        asked.results.unlink(missing_ok=True)
    names = asked.names or [name for name in SWEPT if name not in read(asked.results)]
    for found in outcomes(names, gguf=asked.gguf, log=asked.results.with_suffix(".log")):
        told = verdict(Outcome.of(found))
        bad += told is not None
        gguf = f", GGUF: {found['gguf']}" if found["gguf"] else ""
        print(f"{found['name']}: {told or 'right'} ({found['seconds']} s){gguf}", flush=True)
        with asked.results.open("a") as file:
            file.write(f"{json.dumps(found)}\n")
    done = read(asked.results)
    print(f"{len(names)} types in {time.monotonic() - began:.0f} s; {bad} not as they should be")
    if done.keys() >= SWEPT.keys():
        write_page(PAGE, done)
    return bad


if __name__ == "__main__":
    sys.exit(main())
