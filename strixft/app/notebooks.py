"""Runs the stages through papermill, each in a kernel of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import papermill
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets import default

from strixft.evaluate.stage import check_evaluation, require_held_out
from strixft.plan.result import Plan
from strixft.prepare.stage import Prepared
from strixft.recipe.find import shipped
from strixft.recipe.load import typed_override
from strixft.run.folder import STAGES, Run, chosen_stages
from strixft.run.open import first_reader, set_aside, stages_from
from strixft.support.errors import (
    FitError,
    StageError,
    Stopped,
    StrixftError,
    error_from_text,
)
from strixft.support.files import remove_leftovers, write_text
from strixft.support.signals import Signals, on_signals
from strixft.support.tables import did_you_mean
from strixft.support.text import redact_all, typed
from strixft.train.stage import out_of_memory

START_TIMEOUT_S = 600
"""Seconds that a kernel may take to start: papermill's 60 are too few on a busy machine."""

Notify = Callable[[str, bool], None]
"""Called with each stage before it runs, and true if it is already finished."""


class OwnKernel(AsyncKernelManager):
    """A kernel of this interpreter, whatever kernels `JUPYTER_PATH` holds."""

    @default("kernel_spec_manager")
    def _without_folders(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])  # only ipykernel's own is left


def notebook_of(stage: str) -> Path:
    """Return the notebook of a stage, found by its name: `<number>-<stage>.ipynb`."""
    found = sorted(shipped("notebooks").glob(f"[0-9]*-{stage}.ipynb"))
    if not found:
        raise StageError(f"stage {stage} has no notebook", fix="install strixft again")
    return found[0]


def check_parameters(notebook: Path, parameters: Mapping[str, Any]) -> None:
    """Refuse parameters that a notebook does not have; papermill only warns about them.

    Raises:
        StageError: A parameter does not exist.
    """
    known = papermill.inspect_notebook(_literal(notebook))
    for name in parameters:
        if name not in known:
            raise StageError(
                f"{notebook.name} has no parameter {name!r}", fix=did_you_mean(name, known)
            )


def run_notebook(notebook: Path, output: Path, parameters: Mapping[str, Any]) -> None:
    """Execute a notebook with parameters and keep the executed copy, even if it fails.

    The copy gets its name at the end, complete and without secrets that were printed.

    Raises:
        StageError: A parameter does not exist, or a cell failed.
        StrixftError: A cell raised it.
    """
    check_parameters(notebook, parameters)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.stem}.{os.getpid()}{output.suffix}")
    try:
        _execute(notebook, temporary, parameters)
    except PapermillExecutionError as error:
        own = error_from_text(error.ename.rpartition(".")[2], error.evalue)
        raise own or StageError(
            f"{output.name} stopped at In [{error.exec_count}]: {error.ename}: {error.evalue}",
            fix=f"open {output}",
        ) from error
    finally:
        with contextlib.suppress(OSError, ValueError):  # it never began, or the disk is full
            page = redact_all(json.loads(temporary.read_text(encoding="utf-8")))
            write_text(output, json.dumps(page, indent=1, ensure_ascii=False) + "\n")
        temporary.unlink(missing_ok=True)


def _execute(notebook: Path, target: Path, parameters: Mapping[str, Any]) -> None:
    """Execute a notebook in a kernel that the user's files cannot change.

    Neither a `datasets.py` in the working folder nor IPython's start-up files are run.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        papermill.execute_notebook(
            _literal(notebook),
            _literal(target),
            parameters=dict(parameters),
            kernel_name=NATIVE_KERNEL_NAME,
            kernel_manager_class=OwnKernel,
            progress_bar=False,
            start_timeout=START_TIMEOUT_S,
            extra_arguments=[
                "--IPKernelApp.log_level=ERROR",
                "--IPKernelApp.ignore_cwd=True",
                f"--ProfileDir.location={profile}",
            ],
        )


def _literal(path: Path) -> str:
    """Escape the braces of a path, in which papermill would fill in parameters."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _error_of_stage(run: Run, stage: str, error: DeadKernelError | StrixftError) -> StrixftError:
    """Return the error as the run's status has it, with its settings; or advice about memory."""
    left = run.last_error(stage)
    if isinstance(error, StrixftError):  # one that came through a notebook has only its text
        if left is None or not error.problem.startswith(left.problem):
            return error
        settings = error.settings or left.settings
        return type(error)(error.problem, fix=error.fix, settings=settings)
    if left is not None:
        return left
    what = f"the kernel of stage {stage} died, almost always because memory ran out"
    plan = Plan.load(run.stage_folder(Plan.name))
    if plan is None:
        return FitError(what, fix="close other programs")
    return out_of_memory(run.recipe, plan, what, None)


def _resume_command(run: Run, parameters: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the command that continues a run, with the settings of a fix."""
    kept = {key: value for key, value in parameters["overrides"].items() if key not in settings}
    options = [typed_override(*row) for row in (kept | dict(settings)).items()]
    reader = first_reader(settings)
    done = reader is not None and any(map(run.is_done, stages_from(reader)))
    command = f"strixft run {typed(parameters['recipe'])} --run-dir {typed(run.folder)}"
    return " ".join([command, *options, *([f"--from {reader}"] if done else [])])


def run_stages(
    run: Run,
    recipe: Path,
    overrides: Mapping[str, Any],
    *,
    first: str | None = None,
    last: str | None = None,
    notify: Notify = lambda stage, done: None,
) -> None:
    """Run the unfinished stages.

    Args:
        run: The open run.
        recipe: Its recipe's file.
        overrides: Values by dotted key, as given to `open_run`.
        first: Stage to repeat, together with the later ones; their results are set aside.
        last: Stage to stop after; by default the last one of the recipe.
        notify: Called before each stage.

    Raises:
        StrixftError: A stage failed; the fix ends with the command that continues.
    """
    chosen_stages(first, last)
    parameters = {"recipe": str(recipe), "run_dir": str(run.folder), "overrides": dict(overrides)}
    with run.driven(), _signals_passed_on(run) as signals:
        if first:
            set_aside(run, STAGES[STAGES.index(first) :])
        stages = chosen_stages(None, last or run.last_stage)
        if "evaluate" in stages and not run.is_done("evaluate"):
            check_evaluation(run.recipe)
        interrupted = _interrupted(run)
        remove_leftovers(run.folder)
        for stage in stages:
            if signals.asked:
                raise run.stopped(f"{signals.asked} came before stage {stage}")
            done = run.is_done(stage) and stage not in interrupted
            notify(stage, done)
            if not done:
                with _resumable(run, stage, parameters):
                    if "evaluate" in stages and stage in ("plan", "train"):
                        require_held_out(run.require(Prepared))
                    with run.owned():  # nothing else may be at work when the notebook is written
                        pass
                    notebook = notebook_of(stage)
                    run_notebook(notebook, run.stage_folder(stage) / notebook.name, parameters)


def _interrupted(run: Run) -> list[str]:
    """Return stages whose notebook was being executed by a process that was killed."""
    return [
        stage
        for stage in STAGES
        if list(run.stage_folder(stage).glob(f".{notebook_of(stage).stem}.*.ipynb"))
    ]


@contextlib.contextmanager
def _signals_passed_on(run: Run) -> Iterator[Signals]:
    """Within this block, pass a signal on to the kernel that runs a stage, once there is one."""
    ended = threading.Event()

    def stop_worker() -> None:
        while not ended.wait(0.1):
            others = [one for one in run.workers() if one.pid != os.getpid() and one.is_here]
            if others:
                os.kill(others[0].pid, signal.SIGTERM)
                return

    def pass_on(_: str) -> None:
        threading.Thread(target=stop_worker, daemon=True).start()

    try:
        with on_signals(pass_on) as signals:
            yield signals
    finally:
        ended.set()


@contextlib.contextmanager
def _resumable(run: Run, stage: str, parameters: Mapping[str, Any]) -> Iterator[None]:
    """Add the command that continues the run to an error of this block."""
    try:
        yield
    except (DeadKernelError, StrixftError) as error:
        own = _error_of_stage(run, stage, error)
        command = _resume_command(run, parameters, own.settings)
        if not isinstance(own, Stopped) and command not in own.fix:
            fix = f"{own.fix}\n     then: {command}"
            own = type(own)(own.problem, fix=fix, settings=own.settings)
        raise own from error
