"""Runs tasks of the probe in a child process, and keeps what they gave.

One file for each task in the folder `probes` of the cache folder, named by a digest of all that it
depends on. What may go otherwise next time is not kept: missing memory, an end from outside.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from strixft.child import Figures, run_steps
from strixft.disk import cache_folder
from strixft.probe.device import identity
from strixft.runs import write_json

FOLDER = "probes"
STEP_LIMIT_S = 120.0
"""Of one task; a first run on a new GPU compiles kernels, seconds are the rule."""
FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT")
"""Ends that say nothing of the task: the kernel takes memory back, somebody ends the process."""

_memo: dict[str, Figures] = {}
"""What this process knows, by digest: a cache folder that cannot be written is none."""


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to try."""

    name: str
    kind: str
    """A row of `strixft.probe.child.KINDS`."""
    arguments: dict[str, Any]
    """Plain data; `device` is among them."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further arguments, which change nothing of what others rely on."""

    def depends_on(self) -> dict[str, Any]:
        """All that its figures depend on."""
        return {
            "kind": self.kind,
            "arguments": self.arguments,
            **identity(self.arguments["device"]),
        }

    def digest(self) -> str:
        """Of all that it depends on."""
        text = json.dumps(self.depends_on(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _path(digest: str) -> Path:
    return cache_folder() / FOLDER / f"{digest}.json"


def _known(task: Task) -> Figures | None:
    digest = task.digest()
    if digest not in _memo:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            _memo[digest] = dict(json.loads(_path(digest).read_text(encoding="utf-8"))["figures"])
    return _memo.get(digest)


def _keep(task: Task, figures: Figures, *, lasting: bool) -> None:
    digest = task.digest()
    _memo[digest] = figures
    if lasting:
        with contextlib.suppress(OSError):
            path = _path(digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"depends_on": task.depends_on(), "figures": figures})


def _one_child(tasks: Sequence[Task]) -> int:
    """Do tasks until the child ends; how many of them are done with."""
    words = [asdict(task) for task in tasks]
    command = (sys.executable, "-m", "strixft.probe.child", json.dumps(words))
    probe = run_steps(command, step_limit_s=STEP_LIMIT_S, first=tasks[0].name)
    done = 0
    for task in tasks:
        if task.name in probe.steps:
            figures = dict(probe.steps[task.name])
            passing = "out_of_memory" in figures or "skipped" in figures
        elif task.name == probe.at:
            figures = {"problem": probe.problem(task.name), "ended": probe.ended}
            passing = probe.how.startswith(FROM_OUTSIDE)
        else:
            break
        _keep(task, figures, lasting=not passing)
        done += 1
    return done


def measure(tasks: Sequence[Task], *, fresh: bool = False) -> dict[str, Figures]:
    """Figures of tasks by their names: those that are known, and the others from a child.

    A child that crashes or hangs costs the task that it was in; another one goes on with the rest.

    Args:
        tasks: What to try.
        fresh: Try again what is known.

    Returns:
        `problem` where a task failed, with `ended` where it took the child with it.
    """
    waiting = [task for task in tasks if fresh or _known(task) is None]
    while waiting:
        waiting = waiting[_one_child(waiting) :]
    return {task.name: _memo[task.digest()] for task in tasks}
