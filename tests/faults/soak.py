"""Thousands of updates with saves and passes over held-out rows: nothing may grow."""

from __future__ import annotations

import gc
import json
import os
import threading
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil
from torch import Tensor

import strixft
from faults.smoke import ROWS, ended, fork, write_smoke_recipe
from strixft.data.batches import Batch
from strixft.evaluate.losses import row_losses
from strixft.prepare.stage import Prepared
from strixft.run.folder import Run
from strixft.train.loop import TrainingLoop

EVERY = 25
"""Updates between two looks."""
SETTLED = 0.2
"""Share of the looks that is left out: allocators fill their pools at first."""

EVALUATED_TOKENS = 1024
"""In one batch of held-out rows."""


class _Look:
    """Notes memory, threads and open files; evaluates as often."""

    def __init__(self, run: Run, path: Path) -> None:
        held_out = run.require(Prepared).token_rows(run.recipe.dataset).validation
        self._rows, self._path, self._process = list(held_out), path, psutil.Process()

    def __call__(self, loop: TrainingLoop) -> None:
        """Look, every so many updates."""
        if loop.progress.update % EVERY:
            return
        model = loop.step.model
        model.eval()
        row_losses(model, self._rows, EVALUATED_TOKENS)
        model.train()
        gc.collect()
        look = {
            "update": loop.progress.update,
            "resident_bytes": self._process.memory_info().rss,
            "threads": threading.active_count(),
            "os_threads": self._process.num_threads(),
            "open_files": len(os.listdir("/proc/self/fd")),
        }
        with self._path.open("a") as file:
            file.write(json.dumps(look) + "\n")


def _train(recipe: Path, folder: Path, looks: Path) -> None:
    run = strixft.open_run(recipe, folder)
    strixft.prepare_recipe(run)
    strixft.plan_recipe(run)
    look, finish = _Look(run, looks), TrainingLoop._finish_update

    def finish_and_look(loop: TrainingLoop, batches: list[Batch], loss: Tensor) -> None:
        finish(loop, batches, loss)
        look(loop)

    with patch.object(TrainingLoop, "_finish_update", finish_and_look):
        strixft.train_recipe(run)


def slopes(path: Path) -> dict[str, float]:
    """Growth of each counter per 1,000 updates, after it has settled."""
    looks = [json.loads(line) for line in path.read_text().splitlines()]
    looks = looks[int(len(looks) * SETTLED) :]
    updates = np.array([look["update"] for look in looks])
    names = [name for name in looks[0] if name != "update"]
    return {
        name: float(np.polyfit(updates, [look[name] for look in looks], 1)[0] * 1000)
        for name in names
    }


def soak(folder: Path, updates: int) -> dict[str, float]:
    """Train a tiny model for many updates; growth per 1,000 updates."""
    often = {"tokens_per_update": 1, "save_every_minutes": 0.05}
    recipe = write_smoke_recipe(folder, epochs=updates / ROWS, **often)
    looks, log = folder / "looks.jsonl", folder / "soak.log"
    code = ended(fork(partial(_train, recipe, folder / "run", looks), log))
    assert code == 0, f"ended with {code}: see {log}"
    found = slopes(looks)
    last = json.loads(looks.read_text().splitlines()[-1])
    print(f"soak, {last['update']} updates: {last}; growth per 1,000 updates: {found}", flush=True)
    return found
