"""Two starts of one run at once, and a clock that goes backwards."""

from __future__ import annotations

import itertools
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

from faults.kills import differences, undisturbed
from faults.smoke import Outcome, do_stages, ended, fork, outcome, write_smoke_recipe


def two_at_once(recipe: Path, folder: Path, expected: Outcome) -> list[str]:
    """Start a run twice; one does it, the other waits or is refused."""
    logs = [folder.with_suffix(f".{number}.log") for number in range(2)]
    pids = [fork(partial(do_stages, recipe, folder), log) for log in logs]
    codes = [ended(pid) for pid in pids]
    texts = [log.read_text() for log in logs]
    faults = [
        f"ended with {code}: {log}"
        for code, text, log in zip(codes, texts, logs, strict=True)
        if code and not (code == 1 and "is at work on" in text)
    ]
    if all(codes):
        return [*faults, "neither finished"]
    return faults + differences(outcome(folder), expected)


def _backwards(recipe: Path, folder: Path) -> None:
    start, calls = time.time(), itertools.count()
    with patch("time.time", lambda: start - 60 * next(calls)):
        do_stages(recipe, folder)


def clock_backwards(recipe: Path, folder: Path, expected: Outcome) -> list[str]:
    """Each look at the clock finds it a minute earlier."""
    log = folder.with_suffix(".log")
    code = ended(fork(partial(_backwards, recipe, folder), log))
    return [f"ended with {code}: {log}"] if code else differences(outcome(folder), expected)


def starts(folder: Path, count: int = 10) -> dict[str, list[str]]:
    """Both; the faults of each."""
    recipe = write_smoke_recipe(folder)
    expected, _ = undisturbed(recipe, folder / "whole")
    found = {
        f"two at once {number}": two_at_once(recipe, folder / f"run-{number}", expected)
        for number in range(count)
    }
    found["clock"] = clock_backwards(recipe, folder / "clock", expected)
    for name, wrong in found.items():
        print(f"starts, {name}: {wrong or 'one run, whole'}", flush=True)
    return found
