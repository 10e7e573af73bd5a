"""Three of the faults that `make faults` plays in full: what was disturbed ends like the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

PLAY = """
import json, sys
from pathlib import Path
import strixft.evaluate.stage
import strixft.app.report
import strixft.train.stage
from faults.{name} import {name}
print(json.dumps({name}(Path(sys.argv[1]), *{counts})))
"""


def play(name: str, folder: Path, *counts: int) -> Any:
    """Play a fault in a process that has no threads yet, since it forks."""
    found = subprocess.run(
        [sys.executable, "-c", PLAY.format(name=name, counts=counts), folder],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"},
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def test_a_killed_run_finishes_as_if_nothing_had_happened(tmp_path: Path) -> None:
    where, faults = play("kills", tmp_path, 1)
    assert sum(where.values()) == 1
    assert faults == {}


def test_memory_that_runs_out_stops_a_training_in_time(tmp_path: Path) -> None:
    found = play("pressure", tmp_path)
    assert [faults for _, faults in found.values()] == [[], []]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path) -> None:
    found = play("disks", tmp_path, 1)
    assert found == {"full 0": [], "read-only": []}
