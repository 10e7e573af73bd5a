"""Ask the process that works on a run to stop, and wait until it has."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from strixft.run.folder import Run
from strixft.support.errors import StageError


def stop_run(run: Run, notify: Callable[[int], None] = lambda pid: None) -> dict[str, Any]:
    """Stop a run cleanly; a second request from elsewhere ends its process at once.

    Args:
        run: The run.
        notify: Called with the number of the process that was asked.

    Returns:
        The run's status after its process has ended.

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
    os.kill(first.pid, signal.SIGTERM)
    notify(first.pid)
    while any(worker.is_alive for worker in workers):
        time.sleep(0.2)
    return run.status()
