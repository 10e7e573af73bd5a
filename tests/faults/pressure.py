"""Memory that runs out while a run trains: it stops in time, and what it saved is whole."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

from faults.counters import Frame, Player, recorded, strix_halo_fills
from faults.smoke import do_stages, ended, fork, write_smoke_recipe
from strixft.guard import stage_watches
from strixft.guard.watch import MemoryWatch, level_of, read_counters
from strixft.run.open import find_run
from strixft.train.checkpoints import Checkpoints

MOST_S = 2.0
"""Between the threshold and the request to stop."""
SCENES: dict[str, tuple[Sequence[Frame], float]] = {
    "recorded, with 9.65 GiB less available": (recorded(less_gib=9.65), 1),
    "written for a Strix Halo": (strix_halo_fills(seconds=6, begin=118, end=124.3), 2),
}
"""Frames and the reserve in GiB: half of it is reached on the way, a quarter is not."""


def delay_s(frames: Sequence[Frame], reserve_gib: float, root: Path) -> float:
    """Seconds from the frame that reaches half of the reserve to the request."""
    asked: list[float] = []
    reserve = round(reserve_gib * 2**30)
    player = Player(frames, root)
    watch = MemoryWatch(
        reserve,
        warn=lambda text: None,
        ask=lambda error: asked.append(time.monotonic()),
        leave=lambda error: None,
        root=root,
    )
    with watch:
        player.start()
        player.join()
        time.sleep(MOST_S)
    return asked[0] - player.times[first_stop(frames, reserve, root / "look")]


def first_stop(frames: Sequence[Frame], reserve: int, root: Path) -> int:
    """Index of the first frame that asks for a stop."""
    for index, frame in enumerate(frames):
        frame.write(root)
        if level_of(read_counters(root), reserve) == "stop":
            return index
    raise AssertionError("no frame asks for a stop")


def _under_pressure(recipe: Path, folder: Path, frames: Sequence[Frame], root: Path) -> None:
    """Train while the counters are played; in a process of its own."""
    frames[0].write(root)
    begin = MemoryWatch.require_reserve

    def then_play(watch: MemoryWatch) -> None:
        begin(watch)
        Player(frames, root).start()

    with (
        patch.object(stage_watches, "ROOT", root),
        patch.object(MemoryWatch, "require_reserve", then_play),
    ):
        do_stages(recipe, folder)


def stop_and_finish(folder: Path, frames: Sequence[Frame], reserve_gib: float) -> list[str]:
    """Train under pressure, look at what is on disk, then finish without it."""
    recipe = write_smoke_recipe(folder, memory_reserve_gib=reserve_gib, epochs=40)
    run, log = folder / "run", folder / "run.log"
    root = folder / "root"
    code = ended(fork(partial(_under_pressure, recipe, run, frames, root), log))
    status = find_run(run).status()
    faults = [] if code == 3 else [f"ended with {code}: see {log}"]
    if status.get("error") != "FitError" or " is saved" not in status["problem"]:
        faults.append(f"the status says {json.dumps(status)}")
    checkpoints = run / "train/checkpoints"
    manifest = json.loads(max(checkpoints.glob("*/manifest.json")).read_text())
    if Checkpoints(checkpoints, manifest["inputs"]).newest() is None:
        faults.append("no checkpoint is whole")
    return faults


def pressure(folder: Path) -> dict[str, tuple[float, list[str]]]:
    """Each scene: the delay in seconds, and the faults."""
    found = {}
    for number, (name, (frames, reserve_gib)) in enumerate(SCENES.items()):
        seconds = delay_s(frames, reserve_gib, folder / f"root-{number}")
        faults = stop_and_finish(folder / f"scene-{number}", frames, reserve_gib)
        if seconds > MOST_S:
            faults.append(f"asked after {seconds:.2f} s")
        found[name] = seconds, faults
        print(f"pressure, {name}: asked after {seconds:.2f} s: {faults or 'whole'}", flush=True)
    return found
