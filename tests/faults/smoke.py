"""A small run to disturb: its stages in a forked process, and what must be the same afterwards."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import chats, recipe_writer, write_tiny_model

import strixft
from strixft.run.folder import STAGES, Result, Run
from strixft.run.open import find_run

ROWS = 9
"""Packed rows that the smoke recipe trains on, one update each."""
ADAPTER_FILE = "train/adapter/adapter_model.safetensors"
_NUMBER = re.compile(r"checkpoint-\d+")


def write_smoke_recipe(folder: Path, memory_reserve_gib: float = 0, **train: Any) -> Path:
    """Packed rows and a random model of two layers; it saves after nearly every update."""
    folder.mkdir(parents=True, exist_ok=True)
    write = recipe_writer(folder, write_tiny_model(folder / "model"))
    settings = {"epochs": 2, "tokens_per_update": 150, "micro_batch": 1, **train}
    return write(
        "smoke",
        rows=chats(30),
        train={"save_every_minutes": 0.002, **settings},
        evaluate={"max_rows": 2},
        memory={"reserve_gib": memory_reserve_gib},
    )


def do_stages(recipe: Path, folder: Path) -> None:
    """All stages but the export and the report, in this process."""
    run = strixft.open_run(recipe, folder)
    for stage in STAGES[: STAGES.index("export")]:
        getattr(strixft, f"{stage}_recipe")(run)
    strixft.write_report(run)


def fork(work: Callable[[], None], log: Path) -> int:
    """Do something in a forked process; what has been imported here need not be again there."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        work()
        code = 0
    except strixft.StrixftError as error:
        traceback.print_exc()
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """Waits for a process; its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(pid: int, seconds: float) -> bool:
    """SIGKILL a process after a while; False if it had ended by itself."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return True


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to have in common with an undisturbed one."""

    adapter: bytes
    figures: dict[str, Any]
    files: frozenset[str]
    """Names below the run folder; of checkpoints without their numbers."""


def outcome(folder: Path) -> Outcome:
    """Read a finished run."""
    run = find_run(folder)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return Outcome(
        (folder / ADAPTER_FILE).read_bytes(),
        {
            "losses": _figure(run, "train", "losses"),
            "tokens": _figure(run, "train", "tokens"),
            "metrics": _figure(run, "evaluate", "metrics"),
        },
        frozenset(_NUMBER.sub("checkpoint-N", name) for name in files),
    )


def _figure(run: Run, stage: str, name: str) -> Any:
    result = Result.load(run.stage_folder(stage))
    assert result is not None
    return result.figures[name]
