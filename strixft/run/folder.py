"""The run folder: one place for everything a run writes, and the record of what is done.

<run>/recipe.yaml   the complete recipe
<run>/status.json   stage, state, pid, started, updated, progress
<run>/.lock         the process that works on it, or the last one that did
<run>/<stage>/      artefacts, the executed notebook, and result.json, written last by rename:
                    the stage is done if it exists
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from strixft.recipe.load import check_recipe, read_settings
from strixft.recipe.schema import Recipe
from strixft.run.live import Observer, page_kept
from strixft.run.show import write_page
from strixft.support import html
from strixft.support.environment import seen_by_torch
from strixft.support.errors import (
    FitError,
    StageError,
    Stopped,
    StrixftError,
    error_of,
    is_out_of_memory,
)
from strixft.support.files import (
    disk_full,
    free_aside,
    is_full,
    known_digest,
    now,
    remove_leftovers,
    versions,
    write_json,
)
from strixft.support.locks import Owner, hold, read_owner
from strixft.support.progress import following
from strixft.support.signals import StopNow, raised
from strixft.support.tables import did_you_mean
from strixft.support.text import redact, typed

STAGES = ("prepare", "plan", "train", "evaluate", "export")
"""Stages in their order; each is a notebook, a folder of the run, and a verb `<stage>_recipe`."""

OWNER_ENDS_S = 10.0
"""Longest wait for a process that owns the run and is about to end."""

LAST_WORDS_S = 1.0
"""Time for a process that must end at once to write the reason down."""

LOCK, DRIVER = ".lock", ".driver"
"""Locks of a run: of the process that does a stage, and of the one that runs the stages."""

ENDED_SILENTLY = "its process ended without a message: it was killed, or the machine went down"


def read_recipe(folder: Path) -> Recipe:
    """Read the recipe of a run folder."""
    path = folder / "recipe.yaml"
    return check_recipe(read_settings(path), name=str(path))


def resume_command(folder: Path) -> str:
    """Return the command that resumes the run in a folder."""
    return f"strixft run {typed(folder / 'recipe.yaml')} --run-dir {typed(folder)}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a stage; `result.json` of its folder."""

    name: ClassVar[str] = ""
    """The stage; each stage has its own subclass, which displays itself."""
    artefacts: ClassVar[tuple[str, ...]] = ()
    """Patterns of the files that later stages read."""

    folder: Path = field(repr=False)
    started: str
    seconds: float
    versions: dict[str, str]
    host: dict[str, Any]
    inputs: dict[str, Any]
    """Everything that the figures depend on, with hashes."""
    figures: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the files that later stages read, by path in the stage's folder."""

    def refusal(self) -> StrixftError | None:
        """Return the error of a result that ends the run; the stage runs again next time."""
        return None

    def _repr_html_(self) -> str:
        """Return the figures for a notebook or the report; stages show more."""
        return html.mapping(self.figures)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as in `result.json`."""
        data = {key: value for key, value in asdict(self).items() if key != "folder"}
        return {"stage": self.name, **data}

    @classmethod
    def load(cls: type[R], folder: Path) -> R | None:
        """Read the stage's result; return None until the stage is done.

        Raises:
            StageError: The file is damaged.
        """
        path = folder / "result.json"
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            del data["stage"]
            found = cls(folder=folder, **data)
            for name in ("inputs", "figures"):
                if not isinstance(data[name], dict) or not data[name]:
                    raise ValueError(f"it has no {name}")
        except (ValueError, TypeError, KeyError) as error:
            raise StageError(
                f"{path} is not a result of stage {folder.name}: {error}",
                fix=f"mv {typed(folder)} {typed(free_aside(folder))}   and run the stage again",
            ) from error
        return found

    def require_whole(self) -> None:
        """Require the files of the stage to be as it wrote them.

        Raises:
            StageError: A file is missing or has changed.
        """
        for name, sha256 in self.files.items():
            path = self.folder / name
            if not path.is_file() or known_digest(path) != sha256:
                fault = "has changed since" if path.is_file() else "is missing:"
                raise StageError(
                    f"{path} {fault} stage {self.name} wrote it",
                    fix=f"restore it, or: {resume_command(self.folder.parent)} --from {self.name}",
                )


R = TypeVar("R", bound=Result)

StageWork = Callable[[Path], tuple[dict[str, Any], dict[str, Any]]]
"""Does a stage in its folder; returns inputs and figures."""


@dataclass(frozen=True)
class Run:
    """A run folder and its recipe."""

    folder: Path
    recipe: Recipe

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    def stage_folder(self, stage: str) -> Path:
        """Return the folder of a stage."""
        return self.folder / stage

    def is_done(self, stage: str) -> bool:
        """Return whether a stage has its result."""
        return (self.stage_folder(stage) / "result.json").is_file()

    def once(self, result: type[R], work: StageWork) -> R:
        """Do a stage, or return its result if it is already done.

        Args:
            result: The stage's result class; its `name` is the stage.
            work: Does the stage in its folder; returns inputs and figures.
        """
        folder = self.stage_folder(result.name)
        if (done := result.load(folder)) is not None:
            return done
        with self.owned():
            if (done := result.load(folder)) is not None:  # by the owner that was waited for
                return done
            path = self.folder / "recipe.yaml"
            if path.is_file() and read_recipe(self.folder) != self.recipe:
                raise StageError(
                    f"{path} has changed since this run was opened",
                    fix="run the same command again",
                )
            write = partial(write_page, self.folder)
            with (
                page_kept(self.observer(), write),
                self._status(result.name),
                self.translate_errors(result.name),
                following(_Told(self, result.name)),
            ):
                found = self._do(result, work)
            if (refusal := found.refusal()) is not None:
                self.set_status(state="failed", **_as_status(refusal))
            return found

    @contextlib.contextmanager
    def translate_errors(self, stage: str) -> Iterator[None]:
        """Turn a signal, a full disk and missing memory into errors with a fix."""
        try:
            with raised():
                yield
        except StopNow as stop:
            raise self.stopped(
                f"stage {stage} ended by {stop}, and begins again next time"
            ) from None
        except Exception as error:
            if is_full(error, self.folder):
                raise disk_full(self.folder) from error
            if is_out_of_memory(error):
                raise FitError(
                    f"stage {stage} of {self.folder} has no memory left: {error}",
                    fix="close other programs, then run the same command again",
                ) from error
            if isinstance(error, OSError) and error.filename is not None:
                place = error.filename2 or error.filename
                raise StageError(
                    f"stage {stage} of {self.folder} cannot use {place}: {error.strerror}",
                    fix=f"ls -ld {typed(place)}   shows what is there, and its owner; after that:"
                    f" {self.resume_command}",
                ) from error
            raise

    @property
    def last_stage(self) -> str:
        """Last stage by default: the export if the recipe names one, else the evaluation."""
        return "export" if self.recipe.export.to else "evaluate"

    @property
    def resume_command(self) -> str:
        """Command that resumes the run."""
        return resume_command(self.folder)

    def stopped(self, how: str) -> Stopped:
        """Return the error of a clean end that a user asked for.

        Args:
            how: Its cause, and the state on disk.
        """
        return Stopped(
            f"{self.folder} is stopped: {how}", fix=f"{self.resume_command}   resumes it"
        )

    def _do(self, result: type[R], work: StageWork) -> R:
        folder = self.stage_folder(result.name)
        folder.mkdir(parents=True, exist_ok=True)
        started, clock = now(), time.monotonic()
        inputs, figures = work(folder)
        artefacts = {path for kind in result.artefacts for path in folder.glob(kind)}
        files = sorted(path for path in artefacts if path.is_file())
        found = result(
            folder=folder,
            started=started,
            seconds=round(time.monotonic() - clock, 3),
            versions=versions(),
            host={
                "machine": platform.machine(),
                "system": platform.platform(),
                "environment": seen_by_torch(),
            },
            inputs=inputs,
            figures=figures,
            files={str(p.relative_to(folder)): known_digest(p) for p in files},
        )
        if found.refusal() is None:
            write_json(folder / "result.json", found.to_dict())
        return found

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the run's lock, as every process that writes into a stage must.

        Raises:
            StageError: Another process works on this run.
            HostError: The folder cannot be written.
        """
        with hold(self.folder / LOCK, self.folder, OWNER_ENDS_S):
            remove_leftovers(self.folder)
            yield

    def driven(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock of the process that runs the stages.

        Raises:
            StageError: Another process runs them.
            HostError: The folder cannot be written.
        """
        return hold(self.folder / DRIVER, self.folder, OWNER_ENDS_S)

    def workers(self) -> list[Owner]:
        """Return the processes at work on this run, the one that runs the stages first."""
        owners = [read_owner(self.folder / name) for name in (DRIVER, LOCK)]
        return [owner for owner in owners if owner and owner.is_alive]

    def require(self, result: type[R]) -> R:
        """Return the result of an earlier stage.

        Raises:
            StageError: The stage has not run yet, or its files have changed.
        """
        found = result.load(self.stage_folder(result.name))
        if found is None:
            raise StageError(
                f"stage {result.name} of {self.folder} has not run yet",
                fix=f"{self.resume_command} --to {result.name}",
            )
        found.require_whole()
        return found

    def status(self) -> dict[str, Any]:
        """Return `status.json`, or a new run's; the state of a damaged file is `unreadable`.

        A stage whose process has ended without a message has failed, whatever the file says.
        """
        path = self.folder / "status.json"
        if not path.is_file():
            return {"stage": None, "state": "new"}
        try:
            status: Any = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            status = None
        if not isinstance(status, dict) or "state" not in status:  # should not hide other runs
            return {"stage": None, "state": "unreadable"}
        if status.get("state") == "running":
            owner = read_owner(self.folder / LOCK)
            if owner is None or not owner.is_alive:
                return {**status, "state": "failed", "problem": ENDED_SILENTLY, "fix": None}
        return dict(status)

    def observer(self) -> Observer:
        """Return one who looks at this run again and again."""
        return Observer(self.folder, STAGES, self.status)

    def set_status(self, *, flush: bool = True, **values: Any) -> None:
        """Put values into `status.json` if the disk has room.

        Args:
            flush: Wait for the disk; progress is of no use after a power cut.
            values: Keys to set.
        """
        with _status_lock, contextlib.suppress(OSError):
            self._write_status({**self.status(), **values}, flush=flush)

    def _write_status(self, status: Mapping[str, Any], *, flush: bool = True) -> None:
        write_json(self.folder / "status.json", {**status, "updated": now()}, flush=flush)

    def leave(self, error: StrixftError) -> None:
        """End this process at once, with the reason in `status.json` and on standard error.

        On a host without memory even that may fail: then the process ends without it.
        """
        last = threading.Timer(LAST_WORDS_S, os._exit, (error.exit_code,))
        last.daemon = True
        last.start()
        self.set_status(state="failed", **_as_status(error))
        os.write(2, f"{error}\n".encode())
        os._exit(error.exit_code)

    def last_error(self, stage: str) -> StrixftError | None:
        """Return the error of ours that ended a stage's process, from `status.json`."""
        found = self.status()
        if (found.get("stage"), found.get("state")) != (stage, "failed") or not found.get("fix"):
            return None
        parts = {"fix": found["fix"], "settings": found.get("settings")}
        return error_of(found.get("error", ""), found["problem"], **parts)

    @contextlib.contextmanager
    def _status(self, stage: str) -> Iterator[None]:
        status: dict[str, Any] = {"stage": stage, "pid": os.getpid(), "started": now()}
        with contextlib.suppress(OSError):  # the work itself reports a full disk
            self._write_status({**status, "state": "running"})
        try:
            yield
        except BaseException as error:
            state = "stopped" if isinstance(error, Stopped) else "failed"
            self.set_status(state=state, **_as_status(error))
            raise
        with _status_lock:
            self._write_status({**status, "state": "done"})


_status_lock = threading.RLock()
"""`status.json` is read, changed and written by more than one thread."""

TOLD_EVERY_S = 0.5
"""Seconds between two notes of a bar's progress."""


class _Told:
    """Puts the state of progress bars into the run's status, not too often.

    `doing` is the bar that moved last, `progress` the one that counts the stage's own work and
    bears its name.
    """

    def __init__(self, run: Run, stage: str) -> None:
        self._run, self._stage, self._told, self._what = run, stage, -math.inf, ""

    def __call__(self, state: dict[str, Any]) -> None:
        now, is_new = time.monotonic(), state["what"] != self._what
        if is_new or state["done"] == state["total"] or now - self._told > TOLD_EVERY_S:
            self._told, self._what = now, state["what"]
            own = {"progress": state} if state["what"] == self._stage else {}
            self._run.set_status(flush=False, doing=state, **own)


def _as_status(error: BaseException) -> dict[str, Any]:
    """Return an error as `status.json` has it; `last_error` is the way back."""
    return {
        "error": type(error).__name__,
        "problem": redact(getattr(error, "problem", str(error)))[:2000],
        "fix": getattr(error, "fix", None),
        "settings": getattr(error, "settings", {}),
    }


def chosen_stages(first: str | None, last: str | None) -> tuple[str, ...]:
    """Return the stages from the first to the last, both included.

    Raises:
        StageError: There is no such stage, or the last comes before the first.
    """
    for stage in (first, last):
        if stage is not None and stage not in STAGES:
            raise StageError(f"there is no stage {stage!r}", fix=did_you_mean(stage, STAGES))
    begin = STAGES.index(first) if first else 0
    end = STAGES.index(last) + 1 if last else len(STAGES)
    if begin >= end:
        raise StageError(f"{first} comes after {last}", fix=f"--from {last} --to {first}")
    return STAGES[begin:end]
