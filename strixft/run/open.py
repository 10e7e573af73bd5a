"""Run folders: found, opened, and given another recipe as long as nothing done depends on it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from strixft.formats.sources import fingerprint
from strixft.recipe.find import find_recipe, workspace
from strixft.recipe.load import dump_recipe, flatten, load_recipe, parse_overrides
from strixft.recipe.schema import Recipe
from strixft.run.folder import DRIVER, LOCK, OWNER_ENDS_S, STAGES, Result, Run, read_recipe
from strixft.support.errors import DataError, RecipeError, StageError, StrixftError
from strixft.support.files import free_aside, write_text
from strixft.support.locks import hold
from strixft.support.text import typed

READ_BY = {
    "model": "prepare",
    "dataset": "prepare",
    "trust_remote_code": "prepare",
    "method": "plan",
    "lora": "plan",
    "train": "plan",
    "memory": "plan",
    "evaluate": "evaluate",
    "export": "export",
}
"""Section of a recipe → the first stage whose result depends on it; of `offline` none does."""


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


def changed_settings(old: Recipe, new: Recipe) -> list[str]:
    """Dotted keys whose values differ."""
    before, after = flatten(old.to_dict()), flatten(new.to_dict())
    keys = sorted(before.keys() | after.keys())
    return [key for key in keys if before.get(key) != after.get(key)]


def first_reader(keys: Iterable[str]) -> str | None:
    """The first stage whose result depends on one of these settings; None if none does."""
    readers = {READ_BY.get(key.partition(".")[0]) for key in keys}
    return next((stage for stage in STAGES if stage in readers), None)


def begin_again(keys: Iterable[str]) -> str:
    """The option of `strixft run` that does again what depends on these settings.

    >>> begin_again(["train.epochs", "evaluate.max_rows"])
    '--from plan'
    """
    reader = first_reader(keys)
    return f"--from {reader}" if reader else ""


def stages_from(stage: str) -> tuple[str, ...]:
    """A stage and those that follow."""
    return STAGES[STAGES.index(stage) :]


def _refuse_other(folder: Path, old: Recipe, new: Recipe) -> None:
    before, after = flatten(old.to_dict()), flatten(new.to_dict())
    keys = changed_settings(old, new)
    listed = "".join(f"\n  {k}: {before.get(k)!r} there, {after.get(k)!r} here" for k in keys)
    stage = first_reader(keys)
    again = f"; or, with strixft run, --from {stage}   does {stage} and what follows again"
    raise RecipeError(
        f"{folder} is taken by a run of another recipe; these keys differ:{listed}",
        fix=f"--run-dir {typed(free_name(folder))}   for a run of its own{again if stage else ''}",
    )


def _take_recipe(folder: Path, recipe: Recipe, first: str | None) -> None:
    """Let a run go on with a changed recipe, if nothing that is done depends on the change."""
    old, run = read_recipe(folder), Run(folder, recipe)
    if old == recipe:
        return
    reader = first_reader(changed_settings(old, recipe))
    if first is not None and reader in (None, *stages_from(first)):
        set_aside(run, stages_from(first))
    elif reader is not None and any(map(run.is_done, stages_from(reader))):
        _refuse_other(folder, old, recipe)
    with run.owned():
        write_text(folder / "recipe.yaml", dump_recipe(recipe))


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
            fix=f"--run-dir {typed(free_name(folder))},"
            f" or: {Run(folder, recipe).resume_command} --from prepare",
        )


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
        first: This stage and the later ones will be done again, so what only they depend on
            may have changed.

    Raises:
        RecipeError: No such recipe, faults in it, or the folder holds a run of another one, with
            stages done that depend on what differs.
        DataError: The folder was prepared from other data.
    """
    run_dir = _as_typed("run_dir", run_dir)
    path = find_recipe(_as_typed("recipe", recipe))
    resolved = load_recipe(path, parse_overrides(overrides))
    folder = run_folder(path, run_dir)
    _require_utf8(path, folder)
    if (folder / "recipe.yaml").is_file():
        _take_recipe(folder, resolved, first)
        if first != "prepare":
            _refuse_other_data(folder, resolved)
    elif not _is_new(folder):
        raise RecipeError(
            f"{folder} exists and is not a run folder", fix=f"--run-dir {typed(free_name(folder))}"
        )
    else:
        _create(folder, resolved)
    return Run(folder, resolved)


def _as_typed(name: str, given: Any) -> Any:
    """A path; `-p run_dir 20261125` of papermill gives a number."""
    if isinstance(given, bool | float):  # 1e5, 2.10 and True cannot be told from what they became
        raise RecipeError(
            f"{name} is {given!r}, which papermill's -p makes of a text that looks like it",
            fix=f"-r {name} …   gives the text as it is typed",
        )
    return str(given) if isinstance(given, int) else given


def _require_utf8(*paths: Path) -> None:
    """Notebooks name them, and are UTF-8."""
    for path in paths:
        if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
            raise RecipeError(
                f"the name {str(path)!r} is not UTF-8", fix="rename it, or --run-dir and a folder"
            )


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
            if not (folder / "recipe.yaml").is_file():
                write_text(folder / "recipe.yaml", dump_recipe(recipe))
            elif (other := read_recipe(folder)) != recipe:
                _refuse_other(folder, other, recipe)
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


def run_folders() -> list[Path]:
    """Folders of all runs of the workspace, by name."""
    return sorted(path.parent for path in (workspace() / "runs").glob("*/recipe.yaml"))


def find_runs() -> list[Run]:
    """All runs of the workspace whose recipe can be read, by name."""
    found = []
    for folder in run_folders():
        with contextlib.suppress(StrixftError):  # one damaged file should not hide the other runs
            found.append(Run(folder, read_recipe(folder)))
    return found


def list_runs() -> list[dict[str, Any]]:
    """Each run of the workspace: name, `status.json`, folder; of a damaged one the problem."""
    runs = {run.folder: run.status() for run in find_runs()}
    damaged = {"stage": None, "state": "unreadable"}
    rows = [(folder, runs.get(folder, damaged)) for folder in run_folders()]
    return [{"run": folder.name, **status, "folder": str(folder)} for folder, status in rows]


def set_aside(run: Run, stages: tuple[str, ...]) -> None:
    """Rename the folders of these stages to `<stage>.N`, so that they are done again.

    Raises:
        StageError: Another process works on this run.
    """
    with run.owned():
        for stage in stages:
            folder = run.stage_folder(stage)
            if folder.is_dir():
                folder.rename(free_aside(folder))
