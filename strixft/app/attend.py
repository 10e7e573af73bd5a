"""Stages in processes of their own, which outlive the notebook or the terminal that started them.

In a notebook that a person looks at, a stage runs beside the kernel and its cell watches. Under
papermill and from the command line it runs where it is called. The results are the same.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from strixft.app.watch import SESSION, LiveView, in_live_notebook
from strixft.evaluate import stage as evaluating
from strixft.evaluate.stage import Evaluated
from strixft.export import stage as exporting
from strixft.export.result import Exported
from strixft.prepare import stage as preparing
from strixft.prepare.stage import Prepared
from strixft.run.folder import Result, Run
from strixft.run.open import stop_run
from strixft.support.errors import StageError, StrixftError
from strixft.support.text import typed
from strixft.train import stage as training
from strixft.train.stage import Trained

OUTPUT = "output.txt"
"""File of the run folder for the output of a process of its own."""

R = TypeVar("R", bound=Result)


def start_detached(words: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a command of ours in a session of its own: closing a terminal does not reach it.

    Args:
        words: The command without `strixft`.
        folder: The run folder, where its output goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / OUTPUT).open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "strixft", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if name != SESSION},
        )


def _attend(run: Run, result: type[R], here: Callable[[Run], R], *options: str) -> R:
    """Do a stage here, or start it beside a notebook and watch it; join one that is at work.

    Args:
        run: The run.
        result: The stage's result.
        here: Does the stage in this process.
        options: Options of its command.

    Raises:
        StrixftError: The stage failed, or was stopped.
    """
    stage = result.name
    if run.is_done(stage) or not in_live_notebook():
        return here(run)
    if not run.workers():
        start_on(run, stage, *options)
    view = LiveView(run)
    try:
        view.wait()
    except KeyboardInterrupt:
        stop_run(run)
        view.wait()
    found = result.load(run.stage_folder(stage))
    if found is None:
        raise ended_by(run) or _no_start(run)
    return found


def start_on(run: Run, command: str, *options: str) -> None:
    """Start a command on a run in a process of its own, and wait until it works there.

    Raises:
        StageError: Another process works there already, or this one ended at once.
    """
    if workers := run.workers():
        raise StageError(
            f"process {workers[0].pid} is at work on {run.folder}",
            fix=f"strixft watch {typed(run.folder)}, or: strixft stop {typed(run.folder)}",
        )
    recipe = str(run.folder / "recipe.yaml")
    words = [command, recipe, "--run-dir", str(run.folder), *options]
    process = start_detached(words, run.folder)
    while not run.workers():
        with contextlib.suppress(subprocess.TimeoutExpired):
            if process.wait(0.2) != 0:
                raise ended_by(run) or _no_start(run)
            return  # all was done


def _no_start(run: Run) -> StageError:
    return StageError(
        f"the process for {run.folder} ended at once",
        fix=f"tail {typed(run.folder / OUTPUT)}   shows what it printed",
    )


def ended_by(run: Run) -> StrixftError | None:
    """Return the error that ended the last process of a run; None if it has none."""
    status = run.status()
    stage, state = status["stage"], status["state"]
    if state in ("done", "new"):
        return None
    if state == "stopped":
        return run.stopped(f"stage {stage} was asked to end")
    if (own := run.last_error(stage)) is not None:
        return own
    return StageError(
        f"stage {stage} of {run.folder} failed: {status.get('problem', state)}",
        fix=f"tail {typed(run.folder / OUTPUT)}   shows what it printed",
    )


def prepare_recipe(run: Run) -> Prepared:
    """See `strixft.prepare.stage.prepare_recipe`."""
    return _attend(run, Prepared, preparing.prepare_recipe)


def train_recipe(run: Run) -> Trained:
    """See `strixft.train.stage.train_recipe`."""
    return _attend(run, Trained, training.train_recipe)


def evaluate_recipe(run: Run) -> Evaluated:
    """See `strixft.evaluate.stage.evaluate_recipe`."""
    return _attend(run, Evaluated, evaluating.evaluate_recipe)


def export_recipe(run: Run, kinds: Sequence[str] = ()) -> Exported:
    """See `strixft.export.stage.export_recipe`."""
    options = [word for kind in kinds for word in ("--to", kind)]
    return _attend(run, Exported, lambda run: exporting.export_recipe(run, tuple(kinds)), *options)
