"""Stages in processes of their own, which outlive the notebook or the terminal that started them.

In a notebook that a person looks at, a stage runs beside the kernel and its cell watches. Under
papermill and from the command line it runs where it is called. The results are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from strixft.app.detached import ended_by, no_start, start_on
from strixft.app.watch import LiveView
from strixft.evaluate import stage as evaluating
from strixft.evaluate.stage import Evaluated
from strixft.export import stage as exporting
from strixft.export.result import Exported
from strixft.prepare import stage as preparing
from strixft.prepare.stage import Prepared
from strixft.run.folder import Result, Run
from strixft.run.open import stop_run
from strixft.support.environment import in_live_notebook
from strixft.train import stage as training
from strixft.train.stage import Trained

R = TypeVar("R", bound=Result)


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
    view = LiveView(run, command=(stage, *options))
    try:
        view.wait()
    except KeyboardInterrupt:
        stop_run(run)
        view.wait()
    found = result.load(run.stage_folder(stage))
    if found is None:
        raise ended_by(run) or no_start(run)
    return found


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
