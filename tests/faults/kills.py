"""SIGKILL at random moments; the next call finishes, and nothing shows that it happened."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path

from faults.smoke import Outcome, do_stages, ended, fork, kill_after, outcome, write_smoke_recipe
from strixft.run.open import find_run

PLACES = ("prepare", "plan", "train", "save", "evaluate", "report")
SAVE_SHARE = 0.1
"""There are many saves in a run: of the time of all, a kill comes within the first tenth."""


def stage_of(folder: Path) -> str:
    """Where a run is, or was when it was killed."""
    if not (folder / "status.json").is_file():
        return "start"
    status = find_run(folder).status()
    if status.get("state") == "done":
        return "report" if status["stage"] == "evaluate" else f"after {status['stage']}"
    saving = status["stage"] == "train" and (folder / "train/checkpoints/.writing").is_dir()
    return "save" if saving else str(status["stage"])


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def timeline(pid: int, folder: Path) -> Counter[str]:
    """Seconds that a running process spends in each place, until it ends."""
    spent: Counter[str] = Counter()
    last = time.monotonic()
    while not _has_ended(pid):
        place, now = stage_of(folder), time.monotonic()
        spent[place] += now - last  # type: ignore[assignment]  # seconds, not whole ones
        last = now
        time.sleep(0.002)
    return spent


def kill_in(pid: int, folder: Path, place: str, delay_s: float) -> str | None:
    """SIGKILL a process a while after it has come to a place; where it was then."""
    while stage_of(folder) != place:
        if _has_ended(pid):
            return None
        time.sleep(0.001)
    return stage_of(folder) if kill_after(pid, delay_s) else None


def undisturbed(recipe: Path, folder: Path) -> tuple[Outcome, Counter[str]]:
    """A run that is left alone, and the seconds it spends in each place."""
    pid = fork(lambda: do_stages(recipe, folder), folder.with_suffix(".log"))
    spent = timeline(pid, folder)
    assert ended(pid) == 0
    return outcome(folder), spent


def kill_and_finish(
    recipe: Path, folder: Path, place: str, delay_s: float, expected: Outcome
) -> tuple[str, list[str]]:
    """Kill one run, call it again.

    Returns:
        Where it was killed, and what is wrong with what it has become.
    """
    log = folder.with_suffix(".log")
    pid = fork(lambda: do_stages(recipe, folder), log)
    where = kill_in(pid, folder, place, delay_s) or "not at all"
    ended(pid)
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
    """Kill runs at random moments of each place in turn.

    Returns:
        How many were killed where, and the faults by number of the run.
    """
    recipe = write_smoke_recipe(folder)
    undisturbed(recipe, folder / "warm")
    expected, spent = undisturbed(recipe, folder / "whole")
    moments = random.Random(seed)
    where: Counter[str] = Counter()
    faults = {}
    for number in range(count):
        place = PLACES[(number + seed) % len(PLACES)]
        delay_s = moments.uniform(0, spent[place] * (SAVE_SHARE if place == "save" else 1))
        landed, wrong = kill_and_finish(recipe, folder / f"run-{number}", place, delay_s, expected)
        where[landed] += 1
        if wrong:
            faults[number] = wrong
        print(f"kill {number + 1} of {count}: in {landed}: {wrong or 'whole'}", flush=True)
    return where, faults
