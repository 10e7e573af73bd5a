"""`strixft run` is killed with its notebooks: the command, the kernel, or both."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from conftest import REPOSITORY

from faults.kills import differences, stage_of
from faults.smoke import outcome, write_smoke_recipe

RUN = [sys.executable, "-m", "strixft", "run"]
WHOM = ("command", "kernel", "both")
KERNEL_ENDS_S = 15.0
"""A kernel looks for its parent once a second."""


def start(recipe: Path, folder: Path) -> subprocess.Popen[bytes]:
    """`strixft run` in a session of its own."""
    log = folder.with_suffix(".log").open("ab")
    return subprocess.Popen(
        [*RUN, recipe, "--run-dir", folder],
        cwd=REPOSITORY,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def _kill(command: subprocess.Popen[bytes], whom: str) -> list[psutil.Process]:
    """SIGKILL; returns the kernels there were."""
    kernels = psutil.Process(command.pid).children(recursive=True)
    for kernel in kernels if whom != "command" else []:
        kernel.kill()
    if whom != "kernel":
        os.kill(command.pid, signal.SIGKILL)
    command.wait()
    return kernels


def kill_and_finish(recipe: Path, folder: Path, seconds: float, whom: str) -> tuple[str, list[str]]:
    """Where it was killed, and what is wrong after the next call."""
    command = start(recipe, folder)
    try:
        command.wait(seconds)
        where, kernels = "not at all", []
    except subprocess.TimeoutExpired:
        where = stage_of(folder)
        kernels = _kill(command, whom)
    _, alive = psutil.wait_procs(kernels, timeout=KERNEL_ENDS_S)
    faults = [f"process {kernel.pid} was left over" for kernel in alive]
    code = start(recipe, folder).wait()
    return where, faults + ([f"the next call ended with {code}"] if code else [])


def notebooks(folder: Path, count: int = 6, seed: int = 0) -> dict[int, list[str]]:
    """Kill `strixft run` at random moments; the faults by number of the run."""
    recipe = write_smoke_recipe(folder)
    assert start(recipe, folder / "warm").wait() == 0
    began = time.monotonic()
    assert start(recipe, folder / "whole").wait() == 0
    seconds = time.monotonic() - began
    expected, moments, found = outcome(folder / "whole"), random.Random(seed), {}
    for number in range(count):
        run, whom = folder / f"run-{number}", WHOM[number % len(WHOM)]
        moment = moments.uniform(0.1, 0.95) * seconds
        where, faults = kill_and_finish(recipe, run, moment, whom)
        faults = faults or differences(outcome(run), expected)
        place = f"{whom} at {moment:.1f} s in {where}"
        print(f"notebooks {number + 1} of {count}: {place}: {faults or 'whole'}", flush=True)
        if faults:
            found[number] = faults
    return found
