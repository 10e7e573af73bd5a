"""SIGKILL at random moments; the next call finishes, and nothing shows that it happened."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

from faults.smoke import Outcome, do_stages, ended, fork, kill_after, outcome, write_smoke_recipe
from strixft.runs import find_run


def undisturbed(recipe: Path, folder: Path) -> tuple[Outcome, float]:
    """A run that is left alone, and the seconds it takes."""
    began = time.monotonic()
    assert ended(fork(lambda: do_stages(recipe, folder), folder.with_suffix(".log"))) == 0
    return outcome(folder), time.monotonic() - began


def stage_of(folder: Path) -> str:
    """Where a run was when it was killed; `start` before its first stage."""
    if not (folder / "recipe.yaml").is_file():
        return "start"
    status = find_run(folder).status()
    stage = str(status["stage"] or "start")
    saving = (folder / "train/checkpoints/.writing").is_dir()
    if status.get("state") == "done":
        return f"after {stage}"
    return "save" if saving and stage == "train" else stage


def kill_and_finish(
    recipe: Path, folder: Path, seconds: float, expected: Outcome
) -> tuple[str, list[str]]:
    """Kill one run, call it again.

    Returns:
        Where it was killed, and what is wrong with what it has become.
    """
    log = folder.with_suffix(".log")
    pid = fork(lambda: do_stages(recipe, folder), log)
    killed = kill_after(pid, seconds)
    ended(pid)
    where = stage_of(folder) if killed else "not at all"
    code = ended(fork(lambda: do_stages(recipe, folder), log))
    if code:
        return where, [f"the next call ended with {code}: see {log}"]
    return where, differences(outcome(folder), expected)


def differences(found: Outcome, expected: Outcome) -> list[str]:
    """What a run has not in common with an undisturbed one."""
    faults = []
    if found.adapter != expected.adapter:
        faults.append("another adapter")
    faults += [
        f"another {name}"
        for name in expected.figures
        if found.figures[name] != expected.figures[name]
    ]
    faults += [f"stray {name}" for name in sorted(found.files - expected.files)]
    return faults + [f"no {name}" for name in sorted(expected.files - found.files)]


def kills(folder: Path, count: int, seed: int = 0) -> tuple[Counter[str], dict[int, list[str]]]:
    """Kill runs at random moments.

    Returns:
        How many were killed where, and the faults by number of the run.
    """
    recipe = write_smoke_recipe(folder)
    undisturbed(recipe, folder / "warm")
    expected, seconds = undisturbed(recipe, folder / "whole")
    moments = random.Random(seed)
    where: Counter[str] = Counter()
    faults = {}
    for number in range(count):
        moment = moments.uniform(0, seconds)
        place, wrong = kill_and_finish(recipe, folder / f"run-{number}", moment, expected)
        where[place] += 1
        if wrong:
            faults[number] = wrong
        print(
            f"kill {number + 1} of {count}: at {moment:.2f} s in {place}: {wrong or 'whole'}",
            flush=True,
        )
    return where, faults
