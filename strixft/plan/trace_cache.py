"""Traces on disk, and numbers that took a forward pass to find.

A trace is the same for every run of its regime. A file's name is a digest of everything that it
depends on: the model's dimensions, method, adapter, step options, the device's type, the versions
of the libraries, and strixft's own source.
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
from strixft.support.files import cache_folder, versions, write_text

FOLDER = "plans"


@cache
def _source_digest() -> str:
    """Return a digest of all strixft code: any of it may change what a step does."""
    package = Path(__file__).parent.parent
    texts = (path.read_bytes() for path in sorted(package.rglob("*.py")))
    return hashlib.sha256(b"".join(texts)).hexdigest()


def name_of(job: Job, regime: Any, kinds: Sequence[Any]) -> str:
    """Return the file name of a job's trace, or of anything else that was found for it.

    Args:
        job: Method, adapter, model, host and step options; its data do not count.
        regime: The micro-batches that it is for.
        kinds: Kinds of the layers that were traced.
    """
    recipe, host = job.recipe, job.host
    depends_on = {
        "versions": versions(),
        "source": _source_digest(),
        "config": {k: v for k, v in job.config.to_dict().items() if k != "transformers_version"},
        "method": recipe.method,
        "lora": recipe.lora.model_dump(),
        "optimizer": [recipe.train.optimizer, recipe.train.lora_plus_ratio != 1],
        "options": asdict(job.options),
        "device": [host.device, host.architecture, host.bfloat16],
        "regime": str(regime),
        "kinds": kinds,
    }
    text = json.dumps(depends_on, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _path(name: str) -> Path:
    return cache_folder() / FOLDER / f"{name}.json"


def _write(name: str, data: Any) -> None:
    path = _path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(data, separators=(",", ":")))
    except OSError:  # a cache that cannot be written is not needed either
        return


def number(name: str, find: Callable[[], int]) -> int:
    """Return a number from disk; find and keep it if there is none, or the file is damaged."""
    try:
        return int(json.loads(_path(name).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        found = find()
        _write(name, found)
        return found


def is_kept(name: str) -> bool:
    """Return whether a trace is on disk."""
    return _path(name).exists()


def trace(name: str, find: Callable[[], Trace]) -> Trace:
    """Return a trace from disk; make and keep it if there is none, or the file is damaged."""
    try:
        return _decoded(json.loads(_path(name).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        found = find()
        _write(name, _encoded(found))
        return found


def _encoded(trace: Trace) -> dict[str, Any]:
    """Return a trace as JSON: each place is written once, and named by its number."""
    places: dict[Place | None, int] = {}

    def at(place: Place | None) -> int:
        return places.setdefault(place, len(places))

    return {
        "num_layers": trace.num_layers,
        "storages": [[s.num_bytes, s.part, at(s.born), at(s.died)] for s in trace.storages],
        "events": [[at(place), change] for place, change in trace.events],
        "work": [[at(place), c.flop, c.moved, c.dtype] for place, c in trace.work],
        "places": [place and astuple(place) for place in places],  # the last: `at` fills it
    }


def _decoded(data: dict[str, Any]) -> Trace:
    places: list[Any] = [place and Place(*place) for place in data["places"]]
    return Trace(
        data["num_layers"],
        [Storage(size, part, places[b], places[d]) for size, part, b, d in data["storages"]],
        [(places[n], change) for n, change in data["events"]],
        [(places[n], Cost(flop, tuple(moved), kind)) for n, flop, moved, kind in data["work"]],
    )
