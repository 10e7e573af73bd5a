"""Run folders: found, opened, given another recipe if no finished stage depends on it; stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from strixft.formats.sources import fingerprint
from strixft.recipe.find import find_recipe, workspace
from strixft.recipe.load import dump_recipe, flatten, load_recipe, parse_overrides
from strixft.recipe.schema import Recipe
from strixft.run.folder import DRIVER, LOCK, OWNER_ENDS_S, STAGES, Result, Run, read_recipe
from strixft.run.parameters import cells_run, refuse_unknown
from strixft.run.show import write_page
from strixft.support.errors import DataError, RecipeError, StageError, StrixftError
from strixft.support.files import free_aside, write_text
from strixft.support.locks import hold
from strixft.support.progress import say
from strixft.support.text import typed

READ_BY: dict[str, str | None] = {
    "model": "prepare",
    "dataset": "prepare",
    "thinking": "prepare",
    "trust_remote_code": "prepare",
    "method": "plan",
    "lora": "plan",
    "init_from": "plan",
    "train": "plan",
    "train.trackers": None,
    "memory": "plan",
    "evaluate": "evaluate",
    "export": "export",
}
"""Section of a recipe, or a key of one → the first stage whose result depends on it; none depends
on `offline` and `notify`."""


def run_folder(recipe: Path, run_dir: str | Path | None) -> Path:
    """Return the folder of a recipe's run: `run_dir`, or `runs/<recipe>` of the workspace.

    Raises:
        RecipeError: The recipe's name would lead out of `runs/`.
    """
    if not run_dir and not recipe.stem.strip("."):
        raise RecipeError(f"{recipe.name!r} is not a name for a run", fix="--run-dir and a folder")
    given = Path(os.path.expanduser(run_dir)) if run_dir else Path("runs") / recipe.stem
    return workspace() / given  # an absolute path stays what it is


def free_name(folder: Path) -> Path:
    """Return the first of `<folder>-2`, `<folder>-3`, … that does not exist."""
    number = 2
    while (free := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return free


def _changes(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return settings that differ: dotted key → old and new value."""
    before, after = flatten(old.to_dict()), flatten(new.to_dict())
    both = {key: (before.get(key), after.get(key)) for key in sorted(before.keys() | after.keys())}
    return {key: values for key, values in both.items() if values[0] != values[1]}


def first_reader(keys: Iterable[str]) -> str | None:
    """Return the first stage whose result depends on one of these settings, or None."""
    readers = {READ_BY.get(key, READ_BY.get(key.partition(".")[0])) for key in keys}
    return next((stage for stage in STAGES if stage in readers), None)


def is_prepared_for(folder: Path, recipe: Recipe) -> bool:
    """Return whether the prepared rows of a run folder, if it has any, are those of a recipe."""
    if not (folder / "recipe.yaml").is_file():
        return False
    return first_reader(_changes(read_recipe(folder), recipe)) != "prepare"


def begin_again(keys: Iterable[str]) -> str:
    """Return the option of `strixft run` that repeats the stages that depend on these settings.

    >>> begin_again(["train.epochs", "evaluate.max_rows"])
    '--from plan'
    """
    reader = first_reader(keys)
    return f"--from {reader}" if reader else ""


def stages_from(stage: str) -> tuple[str, ...]:
    """Return a stage and those that follow."""
    return STAGES[STAGES.index(stage) :]


def _refuse_other(folder: Path, old: Recipe, new: Recipe) -> None:
    changes = _changes(old, new)
    listed = "".join(f"\n  {key}: {a!r} there, {b!r} here" for key, (a, b) in changes.items())
    stage = first_reader(changes)
    again = f"; or, with strixft run, --from {stage}   repeats {stage} and the later stages"
    raise RecipeError(
        f"{folder} belongs to a run of another recipe; these keys differ:{listed}",
        fix=f"--run-dir {typed(free_name(folder))}   for a new run{again if stage else ''}",
    )


def _has_trained(run: Run) -> bool:
    """Return whether a run holds training, which nothing sets aside unasked."""
    return run.is_done("train") or any(run.stage_folder("train").glob("checkpoints/checkpoint-*"))


def _do_again(run: Run, first: str, why: str) -> None:
    """Set aside the stages that have cost little, and say so."""
    done = [stage for stage in stages_from(first) if run.is_done(stage)]
    if done:
        set_aside(run, stages_from(first))
        say(f"{why}: {' and '.join(done)} will be done again; the earlier results are kept as .N")


def _take_recipe(folder: Path, recipe: Recipe, first: str | None) -> None:
    """Let a run continue with a changed recipe if no training depends on the change."""
    old, run = read_recipe(folder), Run(folder, recipe)
    if old == recipe:
        return
    changes = _changes(old, recipe)
    reader = first_reader(changes)
    if first is not None and reader in (None, *stages_from(first)):
        set_aside(run, stages_from(first))
    elif reader is not None and not _has_trained(run):
        _do_again(run, reader, f"{', '.join(changes)} changed")
    elif reader is not None and any(map(run.is_done, stages_from(reader))):
        _refuse_other(folder, old, recipe)
    with run.owned():
        write_text(folder / "recipe.yaml", dump_recipe(recipe))


def _take_data(folder: Path, recipe: Recipe) -> None:
    """Prepare files that have changed again, unless a training depends on them.

    Raises:
        DataError: A training does.
    """
    done, run = Result.load(folder / "prepare"), Run(folder, recipe)
    if done is None:
        return
    try:
        now_there, _ = fingerprint(recipe.dataset.sources())
    except DataError:
        return  # moved or deleted: the prepared rows stay
    if done.inputs["source_sha256"] == now_there:
        return
    names = ", ".join(recipe.dataset.sources())
    if _has_trained(run):
        raise DataError(
            f"{names} has changed since {folder} was prepared",
            fix=f"--run-dir {typed(free_name(folder))}, or: {run.resume_command} --from prepare",
        )
    _do_again(run, "prepare", f"{names} has changed")


def open_run(
    recipe: str | Path,
    run_dir: str | Path | None = None,
    overrides: Mapping[str, Any] | str | None = None,
    *,
    first: str | None = None,
) -> Run:
    """Open or create the run folder of a recipe.

    Args:
        recipe: Name or path of the recipe.
        run_dir: The folder; `runs/<recipe>` of the workspace if not given.
        overrides: Values by dotted key, or their JSON text.
        first: This stage and the later ones will be repeated, so settings that only they depend on
            may have changed.

    Raises:
        RecipeError: The recipe does not exist or has faults, or the folder holds a training of
            another recipe, which depends on the difference.
        DataError: The folder holds a training on other data.
        StageError: The notebook was given a parameter that it does not have.
    """
    refuse_unknown(cells_run())
    run_dir = _as_typed("run_dir", run_dir)
    path = find_recipe(_as_typed("recipe", recipe))
    resolved = load_recipe(path, parse_overrides(overrides))
    folder = run_folder(path, run_dir)
    _require_utf8(path, folder)
    if (folder / "recipe.yaml").is_file():
        _take_recipe(folder, resolved, first)
        if first != "prepare":
            _take_data(folder, resolved)
    elif not _is_new(folder):
        raise RecipeError(
            f"{folder} exists and is not a run folder", fix=f"--run-dir {typed(free_name(folder))}"
        )
    else:
        _create(folder, resolved)
    return Run(folder, resolved)


def _as_typed(name: str, given: Any) -> Any:
    """Return a path as text; `-p run_dir 20261125` of papermill passes a number."""
    if isinstance(given, bool | float):  # 1e5, 2.10 and True could have been other texts
        raise RecipeError(
            f"{name} is {given!r}, which papermill's -p makes of a text that looks like it",
            fix=f"-r {name} …   passes the text as it is typed",
        )
    return str(given) if isinstance(given, int) else given


def _require_utf8(*paths: Path) -> None:
    """Refuse paths that notebooks, which are UTF-8, cannot name."""
    for path in paths:
        if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
            raise RecipeError(
                f"the name {str(path)!r} is not UTF-8", fix="rename it, or --run-dir and a folder"
            )


def _is_new(folder: Path) -> bool:
    """Return whether the folder is absent or has only leftovers of a start that was killed."""
    if not folder.exists():
        return True
    ours = (LOCK, DRIVER)
    return folder.is_dir() and all(
        path.name in ours or path.name.startswith(".recipe.yaml.") for path in folder.iterdir()
    )


def _create(folder: Path, recipe: Recipe) -> None:
    """Write the recipe of a new run; of two that start together, the second finds it there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with hold(folder / LOCK, folder, OWNER_ENDS_S):
            if not (folder / "recipe.yaml").is_file():
                write_text(folder / "recipe.yaml", dump_recipe(recipe))
            elif (other := read_recipe(folder)) != recipe:
                _refuse_other(folder, other, recipe)
    except OSError as error:
        raise RecipeError(
            f"the run folder {folder} cannot be created: {error.strerror}",
            fix="--run-dir and a folder that can be written",
        ) from error


def find_run(run: Run | str | Path) -> Run:
    """Return a run by its folder or by its name under `runs/`; a run itself as it is.

    Raises:
        StageError: There is no such run.
    """
    if isinstance(run, Run):
        return run
    folder = find_folder(run)
    return Run(folder, read_recipe(folder))


def find_folder(name_or_path: str | Path) -> Path:
    """Return the folder of a run, whose recipe may be damaged.

    Raises:
        StageError: There is no such run.
    """
    for folder in (Path(name_or_path), workspace() / "runs" / name_or_path):
        if (folder / "recipe.yaml").is_file():
            return folder.resolve()
    raise StageError(f"there is no run {str(name_or_path)!r}", fix="strixft runs   lists the runs")


def run_folders() -> list[Path]:
    """Return the folders of all runs of the workspace, by name."""
    return sorted(path.parent for path in (workspace() / "runs").glob("*/recipe.yaml"))


def find_runs() -> list[Run]:
    """Return all runs of the workspace whose recipe can be read, by name."""
    found = []
    for folder in run_folders():
        with contextlib.suppress(StrixftError):  # one damaged file should not hide the other runs
            found.append(Run(folder, read_recipe(folder)))
    return found


def set_aside(run: Run, stages: tuple[str, ...]) -> None:
    """Rename the folders of these stages to `<stage>.N`, so that they are repeated.

    Raises:
        StageError: Another process works on this run.
    """
    with run.owned():
        for stage in stages:
            folder = run.stage_folder(stage)
            if folder.is_dir():
                folder.rename(free_aside(folder))


def stop_run(
    run: Run, notify: Callable[[int], None] = lambda pid: None, *, state: str = "stopped"
) -> dict[str, Any]:
    """Stop a run cleanly; a second request from elsewhere ends its process at once.

    Args:
        run: The run.
        notify: Called with the number of the process that was asked.
        state: `stopped`, or `paused`: the same for who means to resume it soon.

    Returns:
        The run's status after its process has left it.

    Raises:
        StageError: No process works on the run, or a process on another machine does.
    """
    workers = run.workers()
    if not workers:
        raise StageError(
            f"no process works on {run.folder}", fix="strixft runs   shows the state of each run"
        )
    first = workers[0]
    if not first.is_here:
        raise StageError(
            f"process {first.pid} of {first.host} works on {run.folder}",
            fix=f"run the same command on {first.host}",
        )
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(first.pid, signal.SIGTERM)
    notify(first.pid)
    while set(workers) & set(run.workers()):  # a notebook's kernel lives on without the lock
        time.sleep(0.2)
    if run.status()["state"] == "stopped" != state:
        run.set_status(state=state)
        write_page(run.folder, run.observer().look())
    return run.status()
