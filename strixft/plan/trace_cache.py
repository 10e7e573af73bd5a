"""Traces on disk: a trace says the same for every micro-batch of its regime, and for every run.

So does a number that took a forward pass to find. A file's name is a digest of all that they depend
on: the model's sides, method, adapter, the ways of the step, the device's type, the versions of the
libraries, and our own source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple
from functools import cache
from pathlib import Path
from typing import Any

from strixft.plan.cost import Cost
from strixft.plan.trace import Place, Storage, Trace
from strixft.probe.job import Job
from strixft.support.disk import cache_folder
from strixft.support.files import versions, write_text

FOLDER = "plans"


@cache
def _source_digest() -> str:
    """Of all of our own code: any of it may change what a step does."""
    package = Path(__file__).parent.parent
    texts = (path.read_bytes() for path in sorted(package.rglob("*.py")))
    return hashlib.sha256(b"".join(texts)).hexdigest()


def name_of(job: Job, regime: Any, kinds: Sequence[Any]) -> str:
    """The file's name of a trace, or of what was measured."""
    recipe, host = job.recipe, job.host
    depends_on = {
        "versions": versions(),
        "source": _source_digest(),
        "config": {k: v for k, v in job.config.to_dict().items() if k != "transformers_version"},
        "method": recipe.method,
        "lora": recipe.lora.model_dump(),
        "optimizer": recipe.train.optimizer,
        "ways": asdict(job.options),
        "device": [host.device, host.architecture, host.bfloat16],
        "regime": str(regime),
        "kinds": kinds,
    }
    text = json.dumps(depends_on, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _path(name: str) -> Path:
    return cache_folder() / FOLDER / f"{name}.json"


def _write(name: str, data: Any) -> None:
    """Write a file; a cache that cannot be written is none."""
    path = _path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(data, separators=(",", ":")))
    except OSError:
        return


def save(name: str, trace: Trace) -> None:
    """Write a trace."""
    places: dict[Place, int] = {}

    def number(place: Place | None) -> int | None:
        return None if place is None else places.setdefault(place, len(places))

    data = {
        "num_layers": trace.num_layers,
        "storages": [[s.num_bytes, s.part, number(s.born), number(s.died)] for s in trace.storages],
        "events": [[number(place), index, born] for place, index, born in trace.events],
        "work": [[number(place), c.flop, c.moved, c.dtype] for place, c in trace.work],
    }
    _write(name, data | {"places": [astuple(place) for place in places]})


def _read(name: str) -> Any:
    return json.loads(_path(name).read_text(encoding="utf-8"))


def load(name: str) -> Trace | None:
    """A trace from disk; None where there is none, or the file is damaged."""
    try:
        return _trace(_read(name))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def number(name: str, find: Callable[[], int]) -> int:
    """A number from disk; found and kept where there is none, or the file is damaged."""
    try:
        return int(_read(name))
    except (OSError, ValueError, TypeError):
        found = find()
        _write(name, found)
        return found


def _trace(data: dict[str, Any]) -> Trace:
    places = [Place(*place) for place in data["places"]]

    def place_of(number: int | None) -> Any:
        return None if number is None else places[number]

    return Trace(
        data["num_layers"],
        [Storage(size, part, places[b], place_of(d)) for size, part, b, d in data["storages"]],
        [(places[number], index, born) for number, index, born in data["events"]],
        [(places[n], Cost(flop, tuple(moved), kind)) for n, flop, moved, kind in data["work"]],
    )
