"""Stages in processes of their own, which outlive the notebook or the terminal that started them.

In a notebook that a person looks at, a stage runs beside the kernel and its cell watches. Under
papermill and from the command line it runs where it is called. The results are the same.
"""

from __future__ import annotations

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
        raise ended_by(run) or StageError(
            f"stage {stage} of {run.folder} did not begin",
            fix=f"tail {typed(run.folder / OUTPUT)}   shows what its process printed",
        )
    return found


def start_on(run: Run, command: str, *options: str) -> None:
    """Start a command on a run in a process of its own, and wait until it works there or ends.

    Raises:
        StrixftError: It ended at once, with this error.
    """
    recipe = str(run.folder / "recipe.yaml")
    words = [command, recipe, "--run-dir", str(run.folder), *options]
    process = start_detached(words, run.folder)
    _wait_for_lock(run, process)


def _wait_for_lock(run: Run, process: subprocess.Popen[bytes]) -> None:
    """Wait until a process works on a run, or has ended."""
    while not run.workers():
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
        return


def ended_by(run: Run) -> StrixftError | None:
    """Return the error that ended the last process of a run; None if it is done."""
    status = run.status()
    stage, state = status["stage"], status["state"]
    if state == "done":
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
