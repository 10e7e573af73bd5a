"""The run folder: one place for everything a run writes, and the record of what is done.

<run>/recipe.yaml   the complete recipe
<run>/status.json   stage, state, pid, started, updated, progress
<run>/.lock         the process that works on it, or did so last
<run>/<stage>/      artefacts, the executed notebook, and result.json, written last by rename:
                    it exists, so the stage is done
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from strixft.recipe.load import check_recipe, read_settings
from strixft.recipe.schema import Recipe
from strixft.support import html
from strixft.support.disk import disk_full, is_full
from strixft.support.environment import seen_by_torch
from strixft.support.errors import (
    FIX,
    FitError,
    StageError,
    Stopped,
    StrixftError,
    error_from_text,
    is_out_of_memory,
)
from strixft.support.files import (
    free_aside,
    known_digest,
    now,
    remove_leftovers,
    versions,
    write_json,
)
from strixft.support.locks import Owner, hold, read_owner
from strixft.support.signals import StopNow, raised
from strixft.support.tables import did_you_mean
from strixft.support.text import redact, typed

STAGES = ("prepare", "plan", "train", "evaluate", "export")
"""Stages in their order; each is a notebook, a folder of the run, and a verb `<stage>_recipe`."""

OWNER_ENDS_S = 10.0
"""How long to wait for a process that owns the run and is about to end."""

LAST_WORDS_S = 1.0

LOCK, DRIVER = ".lock", ".driver"
"""Locks of a run: of the process that does a stage, and of the one that goes through the stages."""

ENDED_SILENTLY = "its process ended without a word: it was killed, or the machine went down"


def _hashes(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): known_digest(path) for path in paths}


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a run folder."""
    path = folder / "recipe.yaml"
    return check_recipe(read_settings(path), name=str(path))


def resume_command(folder: Path) -> str:
    """What to type so that the run of a folder goes on."""
    return f"strixft run {typed(folder / 'recipe.yaml')} --run-dir {typed(folder)}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a stage found; `result.json` of its folder."""

    name: ClassVar[str] = ""
    """The stage; each stage's module has its own subclass that knows how to show itself."""
    artefacts: ClassVar[tuple[str, ...]] = ()
    """Patterns of the files that later stages read."""

    folder: Path = field(repr=False)
    started: str
    seconds: float
    versions: dict[str, str]
    host: dict[str, Any]
    inputs: dict[str, Any]
    """What the figures depend on, with hashes."""
    figures: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of what later stages read, by the file's path in the stage's folder."""

    def is_final(self) -> bool:
        """The stage is done with this result; otherwise it runs again next time."""
        return True

    def _repr_html_(self) -> str:
        """The figures, for a notebook or the report; stages show more."""
        return html.mapping(self.figures)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in `result.json`."""
        data = {key: value for key, value in asdict(self).items() if key != "folder"}
        return {"stage": self.name, **data}

    @classmethod
    def load(cls: type[R], folder: Path) -> R | None:
        """The stage's result, or None as long as it is not done.

        Raises:
            StageError: The file is not what a stage writes.
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
                f"{path} is not what stage {folder.name} writes: {error}",
                fix=f"mv {typed(folder)} {typed(free_aside(folder))}   and run the stage again",
            ) from error
        return found

    def require_whole(self) -> None:
        """Refuse files that are not what the stage wrote.

        Raises:
            StageError: With the first of them.
        """
        for name, sha256 in self.files.items():
            path = self.folder / name
            if not path.is_file() or known_digest(path) != sha256:
                what = "is not what" if path.is_file() else "is missing, which"
                raise StageError(
                    f"{path} {what} stage {self.name} wrote",
                    fix=f"bring it back, or: {resume_command(self.folder.parent)}"
                    f" --from {self.name}",
                )


R = TypeVar("R", bound=Result)

Work = Callable[[Path], tuple[dict[str, Any], dict[str, Any]]]
"""Does a stage in its folder; returns inputs and figures."""


@dataclass(frozen=True)
class Run:
    """A run folder and its recipe."""

    folder: Path
    recipe: Recipe

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.name

    def stage_folder(self, stage: str) -> Path:
        """Folder of a stage."""
        return self.folder / stage

    def is_done(self, stage: str) -> bool:
        """The stage has its result."""
        return (self.stage_folder(stage) / "result.json").is_file()

    def once(self, result: type[R], work: Work) -> R:
        """Do a stage, or give back what it found when it was done before.

        Args:
            result: The stage's result class; its `name` is the stage.
            work: Does it; gets the stage's folder, returns inputs and figures.
        """
        folder = self.stage_folder(result.name)
        if (done := result.load(folder)) is not None:
            return done
        with self.owned():
            if (done := result.load(folder)) is not None:  # by the owner that was waited for
                return done
            self._require_own_recipe()
            with self._status(result.name), self.translate_errors(result.name):
                found = self._do(result, work)
            if not found.is_final():
                self.tell(state="failed", problem=f"stage {result.name} refuses", fix=None)
            return found

    def _require_own_recipe(self) -> None:
        path = self.folder / "recipe.yaml"
        if path.is_file() and read_recipe(self.folder) != self.recipe:
            raise StageError(
                f"{path} has changed since this run was opened", fix="type the same command again"
            )

    @contextlib.contextmanager
    def translate_errors(self, stage: str) -> Iterator[None]:
        """A signal, a full disk and missing memory end a stage with an error of ours."""
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
                    fix="close other programs, then type the same command again",
                ) from error
            if isinstance(error, OSError) and error.filename is not None:
                raise self._in_the_way(stage, error) from error
            raise

    def _in_the_way(self, stage: str, error: OSError) -> StageError:
        """The error of a file or folder that a stage cannot use."""
        place = error.filename2 or error.filename
        return StageError(
            f"stage {stage} of {self.folder} cannot use {place}: {error.strerror}",
            fix=f"ls -ld {typed(place)}   shows what is there, and whose it is; after that:"
            f" {self.resume_command}",
        )

    @property
    def last_stage(self) -> str:
        """Where a run ends when nobody says: with the export, if the recipe names one."""
        return "export" if self.recipe.export.to else "evaluate"

    @property
    def resume_command(self) -> str:
        """What to type so that the run goes on."""
        return resume_command(self.folder)

    def stopped(self, how: str) -> Stopped:
        """The clean end that a user asked for.

        Args:
            how: What ended, and what is on disk.
        """
        return Stopped(f"{self.folder} is stopped: {how}", fix=f"{self.resume_command}   goes on")

    def _do(self, result: type[R], work: Work) -> R:
        folder = self.stage_folder(result.name)
        folder.mkdir(parents=True, exist_ok=True)
        started, clock = now(), time.monotonic()
        inputs, figures = work(folder)
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
            files=_hashes(folder, result.artefacts),
        )
        if found.is_final():
            write_json(folder / "result.json", found.to_dict())
        return found

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the run's lock, as every process does that writes into a stage.

        Raises:
            StageError: Another process works on this run.
            HostError: The folder cannot be written.
        """
        with hold(self.folder / LOCK, self.folder, OWNER_ENDS_S):
            remove_leftovers(self.folder)
            yield

    def driven(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock of what goes through the stages.

        Raises:
            StageError: Another process does so.
            HostError: The folder cannot be written.
        """
        return hold(self.folder / DRIVER, self.folder, OWNER_ENDS_S)

    def workers(self) -> list[Owner]:
        """Processes at work on this run: what goes through the stages first."""
        owners = [read_owner(self.folder / name) for name in (DRIVER, LOCK)]
        return [owner for owner in owners if owner and owner.is_alive]

    def require(self, result: type[R]) -> R:
        """What an earlier stage found.

        Raises:
            StageError: It has not run yet, or its files are not what it wrote.
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
        """`status.json`, or a new run's; its state is `unreadable` if it is damaged.

        A stage whose process has ended without a word has failed, whatever is written there.
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

    def report_progress(self, **progress: Any) -> None:
        """Put a stage's progress into `status.json` for whoever watches; no reason to fail.

        It does not wait for the disk: what a power cut takes of it is of no use afterwards.
        """
        self._tell({"progress": progress}, flush=False)

    def tell(self, **values: Any) -> None:
        """Put values into `status.json`, if there is room for it."""
        self._tell(values, flush=True)

    def _tell(self, values: Mapping[str, Any], *, flush: bool) -> None:
        with contextlib.suppress(OSError):
            self._write_status({**self.status(), **values}, flush=flush)

    def _write_status(self, status: Mapping[str, Any], *, flush: bool = True) -> None:
        write_json(self.folder / "status.json", {**status, "updated": now()}, flush=flush)

    def leave(self, error: StrixftError) -> None:
        """End this process at once, with the reason in `status.json` and on standard error.

        A host without memory may not even write that: then the process ends without it.
        """
        last = threading.Timer(LAST_WORDS_S, os._exit, (error.exit_code,))
        last.daemon = True
        last.start()
        self.tell(state="failed", **_told(error))
        os.write(2, f"{error}\n".encode())
        os._exit(error.exit_code)

    def last_error(self, stage: str) -> StrixftError | None:
        """The error that a stage's process left in `status.json` before it ended."""
        status = self.status()
        if (status.get("stage"), status.get("state")) != (stage, "failed"):
            return None
        return error_from_text(status.get("error", ""), f"{status['problem']}{FIX}{status['fix']}")

    @contextlib.contextmanager
    def _status(self, stage: str) -> Iterator[None]:
        status: dict[str, Any] = {"stage": stage, "pid": os.getpid(), "started": now()}
        with contextlib.suppress(OSError):  # a full disk is told by the work itself
            self._write_status({**status, "state": "running"})
        try:
            yield
        except BaseException as error:
            state = "stopped" if isinstance(error, Stopped) else "failed"
            self.tell(state=state, **_told(error))
            raise
        self._write_status({**status, "state": "done"})


def _told(error: BaseException) -> dict[str, Any]:
    """An error as `status.json` has it."""
    problem, fix = getattr(error, "problem", str(error)), getattr(error, "fix", None)
    return {"error": type(error).__name__, "problem": redact(problem)[:2000], "fix": fix}


def chosen_stages(first: str | None, last: str | None) -> tuple[str, ...]:
    """The stages from the first to the last, both included.

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
