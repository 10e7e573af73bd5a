"""One view of a run at work, for the terminal, notebooks and `live.html`.

It needs nothing but `status.json`, the log and the plan's result, so any process can look, at any
time, and no process has to live on to be looked at.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from strixft.run.log import LOG, LogReader, Record

Status = Mapping[str, Any]


LONGEST_LEFT_S = 10 * 365 * 86400.0
"""A longer time left tells of a start that hangs: a file of 600 bytes of 140 GB in 20 minutes."""

RESUMABLE = ("failed", "stopped", "paused")
"""States of a run that ended before its work was done."""


@dataclass(frozen=True, kw_only=True)
class View:
    """A run at one moment."""

    name: str
    status: Status
    """`status.json`, with what became of its process."""
    stages: Mapping[str, bool]
    """All stages in order, and whether each is finished."""
    planned: Mapping[str, Any] = field(default_factory=dict)
    """The plan's figures."""
    last: Record = field(default_factory=dict)
    """The last update, as the log has it."""
    points: list[Record] = field(default_factory=list)
    """Updates for a curve."""
    evaluations: list[Record] = field(default_factory=list)
    """Held-out losses between updates."""
    elapsed_s: float | None = None
    """Time of the stage, of a training that was resumed in all its processes."""
    left_s: float | None = None
    """Time that the rest of the stage takes."""

    @property
    def stage(self) -> str | None:
        """The stage at work, or the last one that was."""
        return self.status.get("stage")

    @property
    def state(self) -> str:
        """The run's state: `new`, `running`, `done`, or one of `RESUMABLE`."""
        return str(self.status["state"])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, without the curve."""
        kept = {key: self.planned.get(key) for key in ("tok_per_s", "reserved_bytes")}
        return {
            "run": self.name,
            **self.status,
            "stages": dict(self.stages),
            "planned": kept,
            "last_update": self.last,
            "last_held_out": self.evaluations[-1] if self.evaluations else {},
            "elapsed_s": self.elapsed_s,
            "left_s": self.left_s,
        }

    @property
    def is_training(self) -> bool:
        """Return whether the log tells of the stage at work."""
        return self.stage == "train" and bool(self.last)

    @property
    def progress(self) -> Mapping[str, Any]:
        """The count that moved last: `what`, `done`, `total`, `unit`."""
        return _as_mapping(self.status.get("doing"))


def _as_mapping(value: Any) -> Mapping[str, Any]:
    """Return what a run of another version may have written otherwise."""
    return value if isinstance(value, Mapping) else {}


def _moment(text: Any) -> float:
    """Return a time of `status.json` in seconds, or now if it is not one."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError):
        return time.time()


def _figures(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["figures"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


class Observer:
    """Looks at a run again and again; only what is new is read.

    Args:
        folder: The run folder.
        stages: Names of all stages.
        status: Returns the run's status.
    """

    def __init__(self, folder: Path, stages: Sequence[str], status: Callable[[], Status]) -> None:
        self._folder, self._stages, self._status = folder, stages, status
        self._log = LogReader(folder / "train" / LOG)
        self._planned: dict[str, Any] = {}

    def look(self) -> View:
        """Return the run as it is now."""
        status, log = self._status(), self._log
        log.read()
        if not self._planned:
            self._planned = _figures(self._folder / "plan" / "result.json")
        is_training = status.get("stage") == "train"
        return View(
            name=self._folder.name,
            status=status,
            stages={
                stage: (self._folder / stage / "result.json").is_file() for stage in self._stages
            },
            planned=self._planned,
            last=log.points[-1] if log.points else {},
            points=log.points,
            evaluations=log.evaluations,
            elapsed_s=self._elapsed_s(status, is_training),
            left_s=self._left_s(status, is_training),
        )

    def _elapsed_s(self, status: Status, is_training: bool) -> float | None:
        if "started" not in status:
            return None
        began = _moment(status["started"])
        ended = time.time() if status["state"] == "running" else _moment(status.get("updated"))
        session = self._log.session if is_training else None
        before = session["busy_s"] - session["seconds"] if session else 0.0
        return max(0.0, ended - began) + before

    def _left_s(self, status: Status, is_training: bool) -> float | None:
        progress = _as_mapping(status.get("doing"))
        done, total = progress.get("done"), progress.get("total")
        if status["state"] != "running" or not total or done == total:
            return None
        if is_training and progress.get("what") == "train":
            return self._log.seconds_left(total)
        seconds = progress.get("elapsed_s")
        left = (total - done) * seconds / done if done and seconds else math.inf
        return left if left < LONGEST_LEFT_S else None


EVERY_S = 2.0
"""Seconds between two pages, and 100 times what one takes: under 1 % of the time."""


@contextlib.contextmanager
def page_kept(observer: Observer, write: Callable[[View], None]) -> Iterator[None]:
    """Write a page of the run again and again while a block runs, and once after it.

    Args:
        observer: Looks at the run.
        write: Writes the page of a view; errors of the disk are passed over.
    """
    ended = threading.Event()

    def keep() -> None:
        pause = 0.0
        while not ended.wait(pause):
            pause = max(EVERY_S, 100 * _written(observer, write))

    thread = threading.Thread(target=keep, name="live page", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _written(observer, write)


def _written(observer: Observer, write: Callable[[View], None]) -> float:
    began = time.thread_time()
    with contextlib.suppress(OSError):  # the work itself reports a full disk
        write(observer.look())
    return time.thread_time() - began
