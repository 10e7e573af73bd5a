"""A disk that fills up, and one that cannot be written: real ones, of memory. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from faults.kills import differences, undisturbed
from faults.smoke import Outcome, do_stages, ended, fork, outcome, write_smoke_recipe
from strixft.run.open import find_run

SIZE = "64m"


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 64 MiB on a folder."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> Path:
    """Take all room that is left."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


def _wait_for_checkpoint(run: Path, pid: int) -> None:
    while not list(run.glob("train/checkpoints/checkpoint-*/manifest.json")):
        assert not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT), "it has ended"
        time.sleep(0.002)


def fill_while_training(recipe: Path, disk: Path, expected: Outcome, wait_s: float) -> list[str]:
    """Fill the disk while a run trains, make room, call it again; the faults."""
    run, log = disk / "run", disk.with_suffix(".log")
    pid = fork(partial(do_stages, recipe, run), log)
    _wait_for_checkpoint(run, pid)
    time.sleep(wait_s)
    ballast = fill(disk)
    code = ended(pid)
    told = log.read_text()
    faults = [] if code == 1 and "is full: " in told else [f"ended with {code}: {told[-800:]}"]
    if not list(run.glob("train/checkpoints/checkpoint-*/manifest.json")):
        faults.append("the last good checkpoint is gone")
    ballast.unlink()
    code = ended(fork(partial(do_stages, recipe, run), log))
    return faults + ([f"then ended with {code}"] if code else differences(outcome(run), expected))


def read_only(recipe: Path, disk: Path) -> list[str]:
    """Call a run again whose folder cannot be written any more; the faults."""
    run, log = disk / "run", disk.with_suffix(".log")
    pid = fork(partial(do_stages, recipe, run), log)
    _wait_for_checkpoint(run, pid)
    os.kill(pid, 9)
    ended(pid)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code = ended(fork(partial(do_stages, recipe, run), log))
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    faults = [] if code == 1 else [f"ended with {code}"]
    if "cannot be written: Read-only file system" not in log.read_text():
        faults.append(f"no word of it in {log}")
    assert find_run(run).status()["state"] == "failed"
    return faults + ([] if before == after else ["something was written"])


def disks(folder: Path, count: int = 4) -> dict[str, list[str]]:
    """A full disk at several moments, and a read-only one; the faults of each."""
    if os.geteuid():
        print("disks: not run, since only root can mount a small one", flush=True)
        return {}
    recipe = write_smoke_recipe(folder, epochs=6)
    expected, _ = undisturbed(recipe, folder / "whole")
    found = {}
    for number in range(count):
        with small_disk(folder / f"disk-{number}") as disk:
            found[f"full {number}"] = fill_while_training(recipe, disk, expected, number * 0.05)
    with small_disk(folder / "read-only") as disk:
        found["read-only"] = read_only(recipe, disk)
    for name, wrong in found.items():
        print(f"disks, {name}: {wrong or 'told, kept, went on'}", flush=True)
    shutil.rmtree(folder / "whole")
    return found
