"""Checkpoints that are damaged while nothing runs: the run goes on from the one before."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

from faults.kills import differences, undisturbed
from faults.smoke import Outcome, do_stages, ended, fork, outcome, write_smoke_recipe
from strixft.run.folder import Result
from strixft.train.stage import Trained

KINDS = ("cut", "flipped byte", "missing file", "empty manifest")


def two_checkpoints(recipe: Path, folder: Path) -> None:
    """A run that is killed once it has two checkpoints, and is still at it."""
    pid = fork(lambda: do_stages(recipe, folder), folder.with_suffix(".log"))
    while len(list(folder.glob("train/checkpoints/checkpoint-*/manifest.json"))) < 2:
        assert not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT), "it has ended"
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    ended(pid)


def newest(folder: Path) -> Path:
    """The newest checkpoint's folder."""
    found = folder.glob("train/checkpoints/checkpoint-*")
    return max(
        (path for path in found if path.name.rpartition("-")[2].isdecimal()),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )


def tear(checkpoint: Path, kind: str, choice: random.Random) -> None:
    """Damage a checkpoint in one of four ways, anywhere in it."""
    files = sorted(path for path in checkpoint.iterdir() if path.stat().st_size)
    path = choice.choice(files)
    if kind == "cut":
        os.truncate(path, choice.randrange(path.stat().st_size))
    elif kind == "flipped byte":
        data = bytearray(path.read_bytes())
        data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
        path.write_bytes(data)
    elif kind == "missing file":
        path.unlink()
    else:
        (checkpoint / "manifest.json").write_text("")


def torn(folder: Path, count: int, seed: int = 0) -> dict[int, list[str]]:
    """Tear checkpoints and call the run again; faults by number of the run."""
    recipe = write_smoke_recipe(folder)
    expected, _ = undisturbed(recipe, folder / "whole")
    choice = random.Random(seed)
    faults = {}
    for number in range(count):
        run, kind = folder / f"run-{number}", KINDS[number % len(KINDS)]
        two_checkpoints(recipe, run)
        checkpoint = newest(run)
        tear(checkpoint, kind, choice)
        code = ended(fork(partial(do_stages, recipe, run), run.with_suffix(".log")))
        wrong = [f"ended with {code}"] if code else _faults(run, checkpoint.name, expected)
        if wrong:
            faults[number] = wrong
        print(f"torn {number + 1} of {count}: {kind}: {wrong or 'set aside, whole'}", flush=True)
    return faults


def _faults(run: Path, name: str, expected: Outcome) -> list[str]:
    result = Result.load(run / Trained.name)
    assert result is not None
    aside = result.figures["checkpoints_set_aside"]
    told = [] if any(text.startswith(f"{name}.torn: ") for text in aside) else ["not told"]
    found = outcome(run)
    stays = {file for file in found.files if ".torn/" in file}
    clean = Outcome(found.adapter, found.figures, found.files - stays)
    return told + differences(clean, expected)
