"""Commands of ours in processes of their own, which outlive what started them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from strixft.run.folder import Run
from strixft.support.environment import SESSION
from strixft.support.errors import StageError, StrixftError
from strixft.support.text import typed

OUTPUT = "output.txt"
"""File of the run folder for the output of a process of its own."""


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
                raise ended_by(run) or no_start(run)
            return  # all was done


def no_start(run: Run) -> StageError:
    """Return the error of a process that ended before it worked on its run."""
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
    if state in ("stopped", "paused"):
        return run.stopped(f"stage {stage} was asked to end")
    if (own := run.last_error(stage)) is not None:
        return own
    return StageError(
        f"stage {stage} of {run.folder} failed: {status.get('problem', state)}",
        fix=f"tail {typed(run.folder / OUTPUT)}   shows what it printed",
    )
