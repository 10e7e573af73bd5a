"""Tasks of the probe, run in a child process; their figures are kept.

Each task has a file in the folder `probes` of the cache folder, named by a digest of all that it
depends on. Figures that may differ next time are not kept: of missing memory, of a processor that
was busy with other work for too long, or an end from
outside.

The child is this file: `python -m strixft.probe.run TASKS FILE`, with the tasks in JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from strixft.attention import core
from strixft.catalog.device_rates import cpu_name
from strixft.probe.attention import measure_backend
from strixft.probe.experts import measure_grouped
from strixft.probe.layers import measure_layers
from strixft.probe.weights import measure_products, round_trip
from strixft.support.child import Figures, do_steps, run_steps
from strixft.support.files import cache_folder, versions, write_json

FOLDER = "probes"

KINDS: Mapping[str, Callable[..., Figures]] = {
    "attention": measure_backend,
    "layers": measure_layers,
    "experts": measure_grouped,
    "nf4": round_trip,
    "products": measure_products,
}

STEP_LIMIT_S = 120.0
"""Limit of one task; a first run on a new GPU compiles kernels, seconds are the rule."""

FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT")
"""Ends that say nothing of the task: the kernel takes memory back, somebody ends the process."""

PACKAGES = (
    *("torch", "transformers", "bitsandbytes"),
    *("flash-attn-4", "flash-linear-attention", "causal-conv1d", "mamba-ssm"),
)

VARIABLES = (
    "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL",
    "TORCH_BLAS_PREFER_HIPBLASLT",
    "ROCBLAS_USE_HIPBLASLT",
    "HSA_ENABLE_SDMA",
)
"""Environment variables that choose kernels."""

DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")

_memo: dict[str, Figures] = {}
"""Figures that this process knows, by digest, also where the cache folder cannot be written."""


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to try."""

    name: str
    kind: str
    """A row of `KINDS`."""
    arguments: dict[str, Any]
    """Plain data; `device` is among them."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further arguments, which change nothing of what others rely on."""

    def depends_on(self) -> dict[str, Any]:
        """Return all that the figures depend on."""
        device = identity(self.arguments["device"])
        return {"kind": self.kind, "arguments": self.arguments, **device}

    def digest(self) -> str:
        """Return the digest of `depends_on`."""
        text = json.dumps(self.depends_on(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def path(self) -> Path:
        """Return the file that keeps the figures."""
        return cache_folder() / FOLDER / f"{self.digest()}.json"

    def known(self) -> Figures | None:
        """Return the figures, where they are known."""
        digest = self.digest()
        if digest not in _memo:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                _memo[digest] = dict(json.loads(self.path().read_text(encoding="utf-8"))["figures"])
        return _memo.get(digest)

    def keep(self, figures: Figures, *, lasting: bool) -> None:
        """Remember the figures; on disk, where they will be the same next time."""
        _memo[self.digest()] = figures
        if lasting:
            with contextlib.suppress(OSError):
                self.path().parent.mkdir(parents=True, exist_ok=True)
                write_json(self.path(), {"depends_on": self.depends_on(), "figures": figures})


def measure(tasks: Sequence[Task], *, fresh: bool = False) -> dict[str, Figures]:
    """Return figures of tasks by their names: those that are known, and the others from a child.

    A child that crashes or hangs costs the task that it was in; another one goes on with the rest.

    Args:
        tasks: What to try.
        fresh: Try again what is known.

    Returns:
        `problem` where a task failed, with `ended` where it took the child with it.
    """
    waiting = [task for task in tasks if fresh or task.known() is None]
    while waiting:
        waiting = waiting[_one_child(waiting) :]
    return {task.name: _memo[task.digest()] for task in tasks}


def measure_here(task: Task) -> Figures:
    """Return the figures of a task that can neither crash nor hang, done in this process."""
    if (known := task.known()) is not None:
        return known
    figures = KINDS[task.kind](**task.arguments, **task.more)
    task.keep(figures, lasting=True)
    return figures


def _one_child(tasks: Sequence[Task]) -> int:
    """Do tasks until the child ends; return how many of them are done with."""
    words = json.dumps([asdict(task) for task in tasks])
    command = (sys.executable, "-m", "strixft.probe.run", words)
    probe = run_steps(command, step_limit_s=STEP_LIMIT_S, first=tasks[0].name)
    for done, task in enumerate(tasks):
        if task.name in probe.steps:
            figures = dict(probe.steps[task.name])
            passing = "out_of_memory" in figures or "skipped" in figures
        elif task.name == probe.at:
            figures = {"problem": probe.problem(task.name), "ended": probe.ended}
            is_busy = probe.ended == "timed out" and task.arguments["device"] == "cpu"
            passing = is_busy or probe.how.startswith(FROM_OUTSIDE)
        else:
            return done
        task.keep(figures, lasting=not passing)
    return len(tasks)


@cache
def _source_digest() -> str:
    """Return the probe's own version: of the code that is probed, and of the code that probes."""
    folders = (Path(__file__).parent, Path(core.__file__).parent)
    files = (path for folder in folders for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _driver() -> str:
    """Return the version of the GPU's driver; the kernel's where the driver is part of it."""
    for name in DRIVERS:
        with contextlib.suppress(OSError):
            return Path(name).read_text(encoding="utf-8").splitlines()[0]
    return platform.release()


@cache
def _facts(device: str) -> dict[str, Any]:
    found = versions()
    packages = {name: found.get(name) for name in PACKAGES}
    if device == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return {"device": cpu_name(), "capability": capability, **packages}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": getattr(properties, "gcnArchName", f"{properties.major}.{properties.minor}"),
        "driver": _driver(),
        "hip": torch.version.hip,
        "cuda": torch.version.cuda,
        **packages,
    }


def identity(device: str) -> dict[str, Any]:
    """Return device (`cuda` or `cpu`), driver, versions, and variables that choose kernels."""
    variables = {name: os.environ.get(name) for name in VARIABLES}
    return {**_facts(device), **variables, "probe": _source_digest()}


def _child(words: str, output: str) -> None:
    tasks = json.loads(words)
    if all(task["arguments"]["device"] == "cpu" for task in tasks):
        torch.set_num_threads(1)  # the work is small there; threads would wait for each other
    work = {t["name"]: partial(KINDS[t["kind"]], **t["arguments"], **t["more"]) for t in tasks}
    do_steps(Path(output), work)


if __name__ == "__main__":
    _child(*sys.argv[1:])
