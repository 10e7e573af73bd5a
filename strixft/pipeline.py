"""The stages through papermill, each in a kernel of its own."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from strixft.errors import FitError, StageError, StrixftError, error_from_text
from strixft.plan import Plan
from strixft.recipe import shipped
from strixft.runs import STAGES, Run, chosen_stages, set_aside
from strixft.tables import did_you_mean
from strixft.units import format_gib

Notify = Callable[[str, bool], None]
"""Told of each stage before it runs: its name, and whether it was done before."""


def notebook_of(stage: str) -> Path:
    """The notebook of a stage, found by its name: `<number>-<stage>.ipynb`."""
    found = sorted(shipped("notebooks").glob(f"[0-9]*-{stage}.ipynb"))
    if not found:
        raise StageError(f"no notebook for stage {stage}", fix="install strixft again")
    return found[0]


def check_parameters(notebook: Path, parameters: Mapping[str, Any]) -> None:
    """Refuse parameters that a notebook does not have; papermill only warns of them.

    Raises:
        StageError: A parameter does not exist.
    """
    known = papermill.inspect_notebook(str(notebook))
    for name in parameters:
        if name not in known:
            raise StageError(
                f"{notebook.name} has no parameter {name!r}", fix=did_you_mean(name, known)
            )


def run_notebook(notebook: Path, output: Path, parameters: Mapping[str, Any]) -> None:
    """Execute a notebook with parameters; the executed copy stays, also when it fails.

    Raises:
        StageError: A parameter does not exist, or a cell failed.
        StrixftError: What a cell raised, if it is one of ours.
    """
    check_parameters(notebook, parameters)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            str(notebook),
            str(output),
            parameters=dict(parameters),
            kernel_name="python3",
            progress_bar=False,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
    except PapermillExecutionError as error:
        raise _own_error(error, output) from error


def _own_error(error: PapermillExecutionError, output: Path) -> StrixftError:
    own = error_from_text(error.ename.rpartition(".")[2], error.evalue)
    return own or StageError(
        f"{output.name} stopped at In [{error.exec_count}]: {error.ename}: {error.evalue}",
        fix=f"open {output}",
    )


def _dead_kernel(run: Run, stage: str) -> FitError:
    plan = Plan.load(run.stage_folder(Plan.name))
    peak = format_gib(plan.figures["peak_bytes"] if plan else None)
    return FitError(
        f"the kernel of stage {stage} died, nearly always for memory; the plan's peak is {peak}",
        fix="close other programs, or --set train.micro_batch=1 with a new --run-dir",
    )


def _with_resume(error: StrixftError, command: str) -> StrixftError:
    return type(error)(error.problem, fix=f"{error.fix}\n     then: {command}")


def run_stages(
    run: Run,
    recipe: Path,
    overrides: Mapping[str, Any],
    *,
    first: str | None = None,
    last: str | None = None,
    notify: Notify = lambda stage, done: None,
) -> None:
    """Run the stages that are not done yet.

    Args:
        run: The open run.
        recipe: Its recipe's file.
        overrides: Values by dotted key, as given to `open_run`.
        first: Set this stage and the later ones aside and do them again.
        last: Stop after this stage.
        notify: Told of each stage before it runs.

    Raises:
        StrixftError: A stage failed; the fix ends with the command that resumes.
    """
    chosen_stages(first, last)
    if first:
        set_aside(run, STAGES[STAGES.index(first) :])
    parameters = {
        "recipe": str(recipe),
        "run_dir": str(run.folder),
        "overrides": dict(overrides),
    }
    for stage in chosen_stages(None, last):
        done = run.is_done(stage)
        notify(stage, done)
        if not done:
            _run_stage(run, stage, parameters)


def _run_stage(run: Run, stage: str, parameters: Mapping[str, Any]) -> None:
    notebook = notebook_of(stage)
    resume = f"strixft run {parameters['recipe']} --run-dir {run.folder}"
    settings = (f"{key}={value}" for key, value in parameters["overrides"].items())
    resume += "".join(f" --set {shlex.quote(setting)}" for setting in settings)
    try:
        run_notebook(notebook, run.stage_folder(stage) / notebook.name, parameters)
    except DeadKernelError as error:
        raise _with_resume(_dead_kernel(run, stage), resume) from error
    except StrixftError as error:
        raise _with_resume(error, resume) from error
