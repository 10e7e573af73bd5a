"""A run is stopped from elsewhere: cleanly, with exit code 0, and it goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY, WriteRecipe, chats

from strixft.app.detached import start_on
from strixft.app.watch import views
from strixft.plan.result import plan_recipe
from strixft.prepare.stage import prepare_recipe
from strixft.run.folder import Run
from strixft.run.open import find_run, open_run, stop_run
from strixft.support.errors import StageError

COMMAND = [sys.executable, "-m", "strixft"]
Process = subprocess.Popen[str]


def start(command: str, recipe: Path, folder: Path, *more: str) -> Process:
    """A command of ours in a process of its own."""
    return subprocess.Popen(
        [*COMMAND, command, str(recipe), "--run-dir", str(folder), *more],
        cwd=REPOSITORY,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def wait_until_it_trains(process: Process, folder: Path) -> None:
    """Until an update is finished."""
    deadline = time.monotonic() + 180
    while True:
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline, "training did not start"
        status = find_run(folder).status() if (folder / "recipe.yaml").is_file() else {}
        if status.get("stage") == "train" and status.get("progress", {}).get("done"):
            return
        time.sleep(0.05)


@pytest.fixture
def recipe(write_recipe: WriteRecipe) -> Path:
    """A recipe that takes its time."""
    train = {"epochs": 60, "tokens_per_update": 100, "micro_batch": 1}
    return write_recipe(rows=chats(40), train=train, dataset={"packing": False})


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    """Processes that are killed at the end if they still run."""
    found: list[Process] = []
    yield found
    for process in found:
        with process:
            process.kill()


def test_a_run_that_nobody_works_on_cannot_be_stopped(tiny_run: Run) -> None:
    with pytest.raises(StageError, match=f"no process works on {tiny_run.folder}") as caught:
        stop_run(tiny_run)
    assert caught.value.fix == "strixft runs   shows the state of each run"


def test_the_command_stops_a_training(
    recipe: Path, tmp_path: Path, processes: list[Process]
) -> None:
    folder = tmp_path / "run"
    processes.append(start("train", recipe, folder, "--json"))
    wait_until_it_trains(processes[0], folder)
    stopped = subprocess.run([*COMMAND, "stop", folder, "--json"], capture_output=True, text=True)
    out, errors = processes[0].communicate()
    assert (stopped.returncode, processes[0].returncode) == (0, 0)
    assert json.loads(stopped.stdout)["state"] == "stopped"
    assert f"process {processes[0].pid} is ending" in stopped.stderr
    told = json.loads(out)
    assert told["state"] == "stopped"
    assert " is saved" in told["why"]
    assert errors.rstrip().endswith("resumes it")
    assert list(folder.glob("train/checkpoints/checkpoint-*/manifest.json"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_run_through_notebooks_reaches_the_kernel(
    recipe: Path, tmp_path: Path, processes: list[Process], number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    run = open_run(recipe, folder)
    prepare_recipe(run)
    plan_recipe(run)
    processes.append(start("run", recipe, folder))
    wait_until_it_trains(processes[0], folder)
    processes[0].send_signal(number)
    _, errors = processes[0].communicate()
    assert processes[0].returncode == 0, errors
    status = find_run(folder).status()
    assert (status["stage"], status["state"]) == ("train", "stopped")
    assert f"then: strixft run {folder}" not in errors
    assert f"strixft run {folder}/recipe.yaml --run-dir {folder}   resumes it" in errors
    assert list(folder.glob("train/checkpoints/checkpoint-*/manifest.json"))
    assert (folder / "train/30-train.ipynb").is_file()
    assert find_run(folder).workers() == []


def test_a_detached_training_goes_on_by_itself_and_a_second_one_is_refused(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = [*COMMAND, "train", str(write_recipe()), "--run-dir", str(folder), "--detach"]
    started = subprocess.run(words, capture_output=True, text=True, check=True)
    assert f"watch: strixft watch {folder}" in started.stdout
    run = find_run(folder)
    with pytest.raises(StageError, match="is at work on") as caught:
        start_on(run, "train")
    assert caught.value.fix == f"strixft watch {folder}, or: strixft stop {folder}"
    *_, last = views(run)
    assert (last.stage, last.state) == ("train", "done")
    assert (folder / "train/result.json").is_file()
    assert "tok_per_s" in (folder / "output.txt").read_text()


def test_a_detached_start_that_ends_at_once_is_told(tiny_run: Run) -> None:
    with pytest.raises(StageError, match="ended at once") as caught:
        start_on(tiny_run, "no-such-command")
    assert caught.value.fix.startswith("tail ")
    assert "no-such-command" in (tiny_run.folder / "output.txt").read_text()


LIVES_ON = """
import sys, time
from strixft.run.open import find_run
from strixft.support.errors import Stopped
from strixft.train.stage import train_recipe

try:
    train_recipe(find_run(sys.argv[1]))
except Stopped:
    print("still here", flush=True)
    sys.stdin.read()
"""
"""A notebook's kernel: it trains, is stopped, and lives on."""


def test_a_stop_does_not_wait_for_a_process_that_lives_on(
    recipe: Path, tmp_path: Path, processes: list[Process]
) -> None:
    run = open_run(recipe, tmp_path / "run")
    prepare_recipe(run)
    plan_recipe(run)
    command = [sys.executable, "-c", LIVES_ON, str(run.folder)]
    kernel = subprocess.Popen(
        command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    processes.append(kernel)
    wait_until_it_trains(kernel, run.folder)
    status = stop_run(run, state="paused")
    assert status["state"] == "paused"
    assert "train: paused" in (run.folder / "live.html").read_text()
    assert kernel.stdout
    assert kernel.stdout.readline() == "still here\n"
    assert kernel.poll() is None
    assert run.workers() == []
