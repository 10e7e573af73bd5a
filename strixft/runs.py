"""The run folder: one place for everything a run writes, and the record of what is done.

<run>/recipe.yaml   the complete recipe
<run>/status.json   stage, state, pid, started, updated, progress
<run>/.lock         the process that works on it, or did so last
<run>/<stage>/      artefacts, the executed notebook, and result.json, written last by rename:
                    it exists, so the stage is done
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from strixft import views
from strixft.disk import disk_full, is_full
from strixft.environment import seen_by_torch
from strixft.errors import (
    FIX,
    DataError,
    FitError,
    RecipeError,
    StageError,
    Stopped,
    StrixftError,
    error_from_text,
)
from strixft.locks import Owner, hold, read_owner
from strixft.memory import is_out_of_memory
from strixft.recipe import (
    Recipe,
    check_recipe,
    dump_recipe,
    find_recipe,
    flatten,
    load_recipe,
    parse_overrides,
    read_settings,
    workspace,
)
from strixft.sources import fingerprint
from strixft.stopping import StopNow, raised
from strixft.tables import did_you_mean
from strixft.text import redact, redact_all

STAGES = ("prepare", "plan", "train", "evaluate", "export")
"""Stages in their order; each is a notebook, a folder of the run, and a verb `<stage>_recipe`."""

PACKAGES = ("strixft", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets")
OWNER_ENDS_S = 10.0
"""How long to wait for a process that owns the run and is about to end."""
LAST_WORDS_S = 1.0
LOCK, DRIVER = ".lock", ".driver"
"""Locks of a run: of the process that does a stage, and of the one that goes through the stages."""
ENDED_SILENTLY = "its process ended without a word: it was killed, or the machine went down"
_TEMPORARY = re.compile(r"\..+\.(\d+)(\.ipynb)?")


def now() -> str:
    """UTC time, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write by rename, so that a reader sees the old file or the whole new one."""
    write_text(path, json.dumps(redact_all(data), indent=2, ensure_ascii=False) + "\n")


def temporary_name(path: Path) -> Path:
    """Where this thread writes what gets its name when it is whole.

    The number is the thread's, of the main thread the process's own; `/proc` knows both.
    """
    return path.with_name(f".{path.name}.{threading.get_native_id()}")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that were killed."""
    for path in folder.rglob(".*"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and path.is_file() and not Path("/proc", match[1]).exists():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write by rename, flushed to disk before the name changes."""
    temporary = temporary_name(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on, Python's included."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a stage found; `result.json` of its folder."""

    name: ClassVar[str] = ""
    """The stage; each stage's module has its own subclass that knows how to show itself."""

    folder: Path = field(repr=False)
    started: str
    seconds: float
    versions: dict[str, str]
    host: dict[str, Any]
    inputs: dict[str, Any]
    """What the figures depend on, with hashes."""
    figures: dict[str, Any]

    def is_final(self) -> bool:
        """The stage is done with this result; otherwise it runs again next time."""
        return True

    def _repr_html_(self) -> str:
        """The figures, for a notebook or the report; stages show more."""
        return views.mapping(self.figures)

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
            return cls(folder=folder, **data)
        except (ValueError, TypeError, KeyError) as error:
            raise StageError(
                f"{path} is not what stage {folder.name} writes: {error}",
                fix=f"mv {folder} {_aside(folder)}   and run the stage again",
            ) from error


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
            with self._status(result.name), self._ends_told(result.name):
                return self._do(result, work)

    @contextlib.contextmanager
    def _ends_told(self, stage: str) -> Iterator[None]:
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
            fix=f"ls -ld {place}   shows what is there, and whose it is; after that:"
            f" {self.resume_command}",
        )

    @property
    def last_stage(self) -> str:
        """Where a run ends when nobody says: with the export, if the recipe names one."""
        return "export" if self.recipe.export.to else "evaluate"

    @property
    def resume_command(self) -> str:
        """What to type so that the run goes on."""
        return f"strixft run {self.folder / 'recipe.yaml'} --run-dir {self.folder}"

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
            StageError: It has not run yet.
        """
        found = result.load(self.stage_folder(result.name))
        if found is None:
            raise StageError(
                f"stage {result.name} of {self.folder} has not run yet",
                fix=f"{self.resume_command} --to {result.name}",
            )
        return found

    def status(self) -> dict[str, Any]:
        """`status.json`, or a new run's; its state is `unreadable` if it is damaged.

        A stage whose process has ended without a word has failed, whatever is written there.
        """
        path = self.folder / "status.json"
        if not path.is_file():
            return {"stage": None, "state": "new"}
        try:
            status: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # one damaged file should not hide the other runs
            return {"stage": None, "state": "unreadable"}
        if status.get("state") == "running":
            owner = read_owner(self.folder / LOCK)
            if owner is None or not owner.is_alive:
                return {**status, "state": "failed", "problem": ENDED_SILENTLY, "fix": None}
        return status

    def report_progress(self, **progress: Any) -> None:
        """Put a stage's progress into `status.json` for whoever watches; no reason to fail."""
        self.tell(progress=progress)

    def tell(self, **values: Any) -> None:
        """Put values into `status.json`, if there is room for it."""
        with contextlib.suppress(OSError):
            self._write_status({**self.status(), **values})

    def _write_status(self, status: Mapping[str, Any]) -> None:
        write_json(self.folder / "status.json", {**status, "updated": now()})

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


def run_folder(recipe: Path, run_dir: str | Path | None) -> Path:
    """Where a recipe's run lies: `run_dir`, or `runs/<recipe>` of the workspace.

    Raises:
        RecipeError: The recipe's name would lead out of `runs/`.
    """
    if not run_dir and not recipe.stem.strip("."):
        raise RecipeError(f"{recipe.name!r} is no name for a run", fix="--run-dir and a folder")
    given = Path(os.path.expanduser(run_dir)) if run_dir else Path("runs") / recipe.stem
    return workspace() / given  # an absolute path stays what it is


def free_name(folder: Path) -> Path:
    """The first of `<folder>-2`, `<folder>-3`, … that does not exist."""
    number = 2
    while (free := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return free


def _changed(old: Recipe, new: Recipe) -> list[str]:
    before, after = flatten(old.to_dict()), flatten(new.to_dict())
    return [
        f"{key}: {before.get(key)!r} there, {after.get(key)!r} here"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _refuse_other_recipe(folder: Path, recipe: Recipe) -> None:
    changed = _changed(read_recipe(folder), recipe)
    if changed:
        listed = "".join(f"\n  {line}" for line in changed)
        raise RecipeError(
            f"{folder} is taken by a run of another recipe; these keys differ:{listed}",
            fix=f"--run-dir {free_name(folder)}",
        )


def _refuse_other_data(folder: Path, recipe: Recipe) -> None:
    done = Result.load(folder / "prepare")
    if done is None:
        return
    try:
        now_there, _ = fingerprint(recipe.dataset.sources())
    except DataError:
        return  # moved or deleted: what was prepared from it stays
    if done.inputs["source_sha256"] != now_there:
        raise DataError(
            f"{', '.join(recipe.dataset.sources())} has changed since {folder} was prepared",
            fix=f"--run-dir {free_name(folder)}, or:"
            f" strixft run {folder / 'recipe.yaml'} --run-dir {folder} --from prepare",
        )


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a run folder."""
    path = folder / "recipe.yaml"
    return check_recipe(read_settings(path), name=str(path))


def open_run(
    recipe: str | Path,
    run_dir: str | Path | None = None,
    overrides: Mapping[str, Any] | str | None = None,
    *,
    redo: bool = False,
) -> Run:
    """Open or create the run folder of a recipe.

    Args:
        recipe: Name or path of the recipe.
        run_dir: The folder; `runs/<recipe>` of the workspace if not given.
        overrides: Values by dotted key, or their JSON text.
        redo: The data may have changed, because they will be prepared again.

    Raises:
        RecipeError: No such recipe, faults in it, or the folder holds a run of another one.
        DataError: The folder was prepared from other data.
    """
    path = find_recipe(recipe)
    resolved = load_recipe(path, parse_overrides(overrides))
    folder = run_folder(path, run_dir)
    if (folder / "recipe.yaml").is_file():
        _refuse_other_recipe(folder, resolved)
        if not redo:
            _refuse_other_data(folder, resolved)
    elif not _is_new(folder):
        raise RecipeError(
            f"{folder} exists and is not a run folder", fix=f"--run-dir {free_name(folder)}"
        )
    else:
        _create(folder, resolved)
    return Run(folder, resolved)


def _is_new(folder: Path) -> bool:
    """Nothing is there, or only what a start left that was killed at once."""
    if not folder.exists():
        return True
    ours = (LOCK, DRIVER)
    return folder.is_dir() and all(
        path.name in ours or path.name.startswith(".recipe.yaml.") for path in folder.iterdir()
    )


def _create(folder: Path, recipe: Recipe) -> None:
    """Write the recipe of a new run; of two that start at once, the second finds it there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with hold(folder / LOCK, folder, OWNER_ENDS_S):
            if (folder / "recipe.yaml").is_file():
                _refuse_other_recipe(folder, recipe)
            else:
                write_text(folder / "recipe.yaml", dump_recipe(recipe))
    except OSError as error:
        raise RecipeError(
            f"the run folder {folder} cannot be made: {error.strerror}",
            fix="--run-dir and a folder that can be written",
        ) from error


def find_run(name_or_path: str | Path) -> Run:
    """A run by its folder or by its name under `runs/`.

    Raises:
        StageError: There is no such run.
    """
    for folder in (Path(name_or_path), workspace() / "runs" / name_or_path):
        if (folder / "recipe.yaml").is_file():
            return Run(folder.resolve(), read_recipe(folder))
    raise StageError(f"there is no run {str(name_or_path)!r}", fix="strixft runs   lists the runs")


def find_runs() -> list[Run]:
    """All runs of the workspace, by name."""
    folders = sorted((workspace() / "runs").glob("*/recipe.yaml"))
    return [Run(path.parent, read_recipe(path.parent)) for path in folders]


def _aside(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return aside


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


def set_aside(run: Run, stages: tuple[str, ...]) -> None:
    """Rename the folders of these stages to `<stage>.N`, so that they are done again.

    Raises:
        StageError: Another process works on this run.
    """
    with run.owned():
        for stage in stages:
            folder = run.stage_folder(stage)
            if folder.is_dir():
                folder.rename(_aside(folder))
