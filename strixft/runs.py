"""The run folder: one place for everything a run writes, and the record of what is done.

<run>/recipe.yaml   the complete recipe
<run>/status.json   stage, state, pid, started, updated, progress
<run>/<stage>/      artefacts, the executed notebook, and result.json, written last by rename:
                    it exists, so the stage is done
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any, ClassVar, TypeVar

from strixft import views
from strixft.errors import DataError, RecipeError, StageError
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
from strixft.tables import did_you_mean

STAGES = ("prepare", "plan", "train", "evaluate")
"""Stages in their order; each is a notebook, a folder of the run, and a verb `<stage>_recipe`."""

PACKAGES = ("strixft", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets")
OWNER_ENDS_S = 10.0
"""How long to wait for a process that owns the run and is about to end."""


def now() -> str:
    """UTC time, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write by rename, so that a reader sees the old file or the whole new one."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write by rename, flushed to disk before the name changes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
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
            with self._status(result.name):
                return self._do(result, work)

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
            host={"machine": platform.machine(), "system": platform.platform()},
            inputs=inputs,
            figures=figures,
        )
        if found.is_final():
            write_json(folder / "result.json", found.to_dict())
        return found

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the run's lock, which the kernel drops when its process ends, however it ends.

        Raises:
            StageError: Another process works on this run.
        """
        with (self.folder / ".lock").open("a+") as lock:
            deadline = time.monotonic() + OWNER_ENDS_S
            while not _try_lock(lock):
                if time.monotonic() > deadline:
                    lock.seek(0)
                    owner = lock.read().strip()
                    raise StageError(
                        f"process {owner} is at work on {self.folder}",
                        fix=f"wait for it, or: kill {owner}",
                    )
                time.sleep(0.2)
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
            yield

    def require(self, result: type[R]) -> R:
        """What an earlier stage found.

        Raises:
            StageError: It has not run yet.
        """
        found = result.load(self.stage_folder(result.name))
        if found is None:
            raise StageError(
                f"stage {result.name} of {self.folder} has not run yet",
                fix=f"strixft run {self.folder / 'recipe.yaml'} --run-dir {self.folder}"
                f" --to {result.name}",
            )
        return found

    def status(self) -> dict[str, Any]:
        """`status.json`, or a new run's; its state is `unreadable` if it is damaged."""
        path = self.folder / "status.json"
        if not path.is_file():
            return {"stage": None, "state": "new"}
        try:
            status: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # one damaged file should not hide the other runs
            return {"stage": None, "state": "unreadable"}
        return status

    def report_progress(self, **progress: Any) -> None:
        """Put a stage's progress into `status.json` for whoever watches."""
        self._write_status({**self.status(), "progress": progress})

    def _write_status(self, status: Mapping[str, Any]) -> None:
        write_json(self.folder / "status.json", {**status, "updated": now()})

    @contextlib.contextmanager
    def _status(self, stage: str) -> Iterator[None]:
        status: dict[str, Any] = {"stage": stage, "pid": os.getpid(), "started": now()}
        self._write_status({**status, "state": "running"})
        try:
            yield
        except BaseException as error:
            self._write_status({**status, "state": "failed", "problem": str(error)[:2000]})
            raise
        self._write_status({**status, "state": "done"})


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def run_folder(recipe: Path, run_dir: str | Path | None) -> Path:
    """Where a recipe's run lies: `run_dir`, or `runs/<recipe>` of the workspace."""
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
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(
            f"{folder} exists and is not a run folder", fix=f"--run-dir {free_name(folder)}"
        )
    else:
        _create(folder, resolved)
    return Run(folder, resolved)


def _create(folder: Path, recipe: Recipe) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
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
