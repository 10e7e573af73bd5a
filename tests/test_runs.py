"""A run folder keeps what is done, refuses what does not belong to it, and has one owner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import mark_as_trained

from strixft.recipe.load import load_recipe
from strixft.run import folder
from strixft.run import open as opening
from strixft.run.folder import Result, Run
from strixft.run.open import find_run, find_runs, free_name, open_run, set_aside
from strixft.support.errors import (
    DataError,
    FitError,
    RecipeError,
    StageError,
    Stopped,
    StrixftError,
)
from strixft.support.files import digest, now, versions, write_json, write_text
from strixft.support.locks import read_owner, this_process
from strixft.support.progress import progress_bar

RECIPE = "model: m\ndataset: {source: rows.jsonl}\ntrain: {epochs: 3}\n"


@dataclass(frozen=True, kw_only=True)
class Prepared(Result):
    """The first stage."""

    name: ClassVar[str] = "prepare"


@dataclass(frozen=True, kw_only=True)
class Planned(Result):
    """The second stage."""

    name: ClassVar[str] = "plan"


@dataclass(frozen=True, kw_only=True)
class Draft(Result):
    """A stage that refuses all its results."""

    name: ClassVar[str] = "plan"

    def refusal(self) -> StrixftError:
        return FitError("too large", fix="--set lora.r=4", settings={"lora.r": 4})


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with its data."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def run(recipe: Path, tmp_path: Path) -> Run:
    """A new run."""
    return open_run(recipe, tmp_path / "run")


Process = subprocess.Popen[str]
Start = Callable[..., Process]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts scripts as processes of their own; kills what is left of them."""
    processes: list[Process] = []

    def start_script(script: str, *arguments: object) -> Process:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        process = subprocess.Popen(
            command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        processes.append(process)
        return process

    yield start_script
    for process in processes:
        with process:
            process.kill()


def reads_line(process: Process) -> str:
    """Waits for the next line that a process prints."""
    assert process.stdout
    return process.stdout.readline().strip()


def kill(process: Process) -> None:
    """Ends a process so that it can clean up nothing."""
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def prepare(run: Run) -> Prepared:
    """The first stage, as far as a run folder is concerned."""
    source = Path(str(run.recipe.dataset.source))
    return run.once(Prepared, lambda _: ({"source_sha256": digest(source)}, {"rows": 1}))


def must_not_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    raise AssertionError(f"{folder} was done again")


# Files.


def test_json_is_written_and_read_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"text": "é –", "number": 1.5})
    assert json.loads((tmp_path / "a.json").read_text()) == {"text": "é –", "number": 1.5}


def test_a_write_leaves_no_other_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "new \ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_threads_that_write_the_same_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.json"

    def write(number: int) -> None:
        for _ in range(40):
            write_json(path, {"values": [number] * 2000})
            values = json.loads(path.read_text())["values"]
            assert len(values) == 2000
            assert len(set(values)) == 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


WRITE_FOREVER = """
import sys
from pathlib import Path
from strixft.support.files import write_json

number = 0
while True:
    number += 1
    write_json(Path(sys.argv[1]), {"values": [number] * 100_000})
    if number == 1:
        print("written", flush=True)
"""


def test_a_reader_sees_a_whole_file_even_if_the_writer_is_killed(
    tmp_path: Path, start: Start
) -> None:
    path = tmp_path / "a.json"
    writer = start(WRITE_FOREVER, path)
    assert reads_line(writer) == "written"
    seen = [json.loads(path.read_text())["values"] for _ in range(50)]
    kill(writer)
    seen.append(json.loads(path.read_text())["values"])
    assert all(len(values) == 100_000 and len(set(values)) == 1 for values in seen)


# Stages.


def test_a_result_is_the_same_when_it_is_read_again(run: Run) -> None:
    assert Prepared.load(run.stage_folder("prepare")) is None
    result = prepare(run)
    assert Prepared.load(run.stage_folder("prepare")) == result


def test_a_result_has_what_every_stage_reports(run: Run) -> None:
    prepare(run)
    written = json.loads((run.folder / "prepare" / "result.json").read_text())
    assert set(written) == {
        "stage",
        "started",
        "seconds",
        "versions",
        "host",
        "inputs",
        "figures",
        "files",
    }
    assert (written["stage"], written["figures"]) == ("prepare", {"rows": 1})


def test_a_stage_that_is_done_is_not_done_again(run: Run) -> None:
    first = prepare(run)
    assert run.once(Prepared, must_not_run) == first


def test_a_stage_that_failed_is_done_again(run: Run) -> None:
    def fail(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        (folder / "half.bin").write_bytes(b"half")
        raise StageError("no luck", fix="again")

    with pytest.raises(StageError, match="no luck"):
        run.once(Prepared, fail)
    assert not run.is_done("prepare")
    assert prepare(run).figures == {"rows": 1}


def test_a_result_that_is_not_final_is_found_again(run: Run) -> None:
    run.once(Draft, lambda _: ({}, {"fits": False}))
    assert not run.is_done("plan")
    error = run.last_error("plan")
    assert isinstance(error, FitError)
    assert (error.problem, error.settings) == ("too large", {"lora.r": 4})
    assert run.once(Draft, lambda _: ({}, {"fits": True})).figures == {"fits": True}


def test_the_status_tells_which_stage_is_at_work(run: Run) -> None:
    seen: list[dict[str, Any]] = []

    def work(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        for _ in progress_bar(range(3), total=9, desc="prepare", unit="row"):
            pass
        seen.append(run.status())
        return {}, {}

    assert run.status() == {"stage": None, "state": "new"}
    run.once(Prepared, work)
    assert (seen[0]["stage"], seen[0]["state"], seen[0]["pid"]) == (
        "prepare",
        "running",
        os.getpid(),
    )
    progress = seen[0]["progress"]
    assert (progress["what"], progress["total"]) == ("prepare", 9)
    assert run.status()["state"] == "done"


def test_the_status_tells_why_a_stage_failed(run: Run) -> None:
    with pytest.raises(ZeroDivisionError):
        run.once(Prepared, lambda _: ({}, {"x": 1 / 0}))
    assert (run.status()["state"], run.status()["problem"]) == ("failed", "division by zero")


LEAVE = """
import sys
from strixft.support.errors import FitError
from strixft.run.open import find_run
run = find_run(sys.argv[1])
with run.owned(), run._status("train"):
    run.leave(FitError("no memory \\x1b[2J", fix="buy some", settings={"lora.r": 4}))
"""


def test_a_process_that_must_leave_at_once_says_why(run: Run) -> None:
    command = [sys.executable, "-c", LEAVE, str(run.folder)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == FitError.exit_code
    assert found.stderr == "no memory ⟦U+001B⟧[2J\nfix: buy some\n"
    assert (run.status()["stage"], run.status()["state"]) == ("train", "failed")
    error = run.last_error("train")
    assert isinstance(error, FitError)
    assert (error.problem, error.fix) == ("no memory ⟦U+001B⟧[2J", "buy some")
    assert error.settings == {"lora.r": 4}
    assert run.last_error("plan") is None


def test_a_process_that_ended_without_a_word_has_failed(run: Run, start: Start) -> None:
    process = start(WORK, run.folder)
    assert reads_line(process) == "at work"
    assert run.status()["state"] == "running"
    kill(process)
    assert run.status()["state"] == "failed"
    assert run.status()["problem"].startswith("its process ended without a message")
    assert run.last_error("prepare") is None


def test_a_stage_that_a_signal_ended_is_stopped(run: Run) -> None:
    def work(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        os.kill(os.getpid(), signal.SIGTERM)
        return must_not_run(folder)

    with pytest.raises(Stopped, match="stage prepare ended by SIGTERM") as caught:
        run.once(Prepared, work)
    assert caught.value.fix == f"{run.resume_command}   resumes it"
    assert run.status()["state"] == "stopped"
    assert not run.is_done("prepare")


def test_files_of_killed_processes_are_removed_and_others_stay(run: Run) -> None:
    names = [".status.json.4194303", "train/.30-train.4194303.ipynb"]
    kept = [f".status.json.{os.getpid()}", ".hidden", "train/.notes.txt"]
    (run.folder / "train").mkdir()
    for name in (*names, *kept):
        (run.folder / name).touch()
    with run.owned():
        pass
    assert not [name for name in names if (run.folder / name).exists()]
    assert all((run.folder / name).exists() for name in kept)


def test_a_start_that_was_killed_at_once_is_no_obstacle(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".recipe.yaml.4194303").write_text("mod")
    assert open_run(recipe, folder).status()["state"] == "new"


def test_of_two_that_start_at_once_the_second_keeps_the_firsts_recipe(
    recipe: Path, tmp_path: Path
) -> None:
    first = open_run(recipe, tmp_path / "run")
    with pytest.raises(RecipeError, match=r"train\.epochs: 3\.0 there, 4\.0 here"):
        opening._create(first.folder, load_recipe(recipe, {"train.epochs": 4}))
    assert load_recipe(first.folder / "recipe.yaml").train.epochs == 3


def test_a_status_that_is_damaged_is_not_the_end(run: Run) -> None:
    (run.folder / "status.json").write_text('{"stage": "tr')
    assert run.status() == {"stage": None, "state": "unreadable"}


def test_a_stage_that_needs_an_earlier_one_says_what_to_type(run: Run) -> None:
    with pytest.raises(StageError) as caught:
        run.require(Prepared)
    assert caught.value.problem == f"stage prepare of {run.folder} has not run yet"
    assert caught.value.fix == (
        f"strixft run {run.folder}/recipe.yaml --run-dir {run.folder} --to prepare"
    )


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"stage": "prepare"}', '{"stage": 1, "x": 2}']
)
def test_a_damaged_result_says_which_file_and_what_to_type(run: Run, text: str) -> None:
    folder = run.stage_folder("prepare")
    folder.mkdir()
    (folder / "result.json").write_text(text)
    with pytest.raises(StageError) as caught:
        Prepared.load(folder)
    assert caught.value.problem.startswith(
        f"{folder}/result.json is not a result of stage prepare: "
    )
    assert caught.value.fix == f"mv {folder} {folder}.1   and run the stage again"


def test_versions_name_what_a_result_depends_on() -> None:
    assert {"python", "strixft", "torch", "transformers"} <= set(versions())


def test_times_can_be_compared_as_text() -> None:
    assert now().endswith("+00:00")


# Opening.


def test_a_new_run_holds_the_complete_recipe(run: Run) -> None:
    assert load_recipe(run.folder / "recipe.yaml") == run.recipe


def test_a_run_lies_under_runs_by_the_name_of_its_recipe(recipe: Path, tmp_path: Path) -> None:
    assert open_run(recipe).folder == tmp_path / "runs" / "mine"


def test_a_relative_run_folder_is_relative_to_the_project(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert open_run(recipe, "runs/x").folder == tmp_path / "runs" / "x"


def test_the_same_recipe_opens_the_same_run(recipe: Path, run: Run) -> None:
    result = prepare(run)
    assert open_run(recipe, run.folder).once(Prepared, must_not_run) == result


def test_the_complete_recipe_of_a_run_opens_it_too(run: Run) -> None:
    assert open_run(run.folder / "recipe.yaml", run.folder) == run


def test_a_run_that_is_taken_names_the_keys_that_differ(recipe: Path, run: Run) -> None:
    run.once(Planned, lambda _: ({"rows": "1"}, {"fits": True}))
    mark_as_trained(run.folder)
    with pytest.raises(RecipeError) as caught:
        open_run(recipe, run.folder, {"train.epochs": 4, "lora.r": 8})
    assert caught.value.problem == (
        f"{run.folder} belongs to a run of another recipe; these keys differ:\n"
        "  lora.r: 16 there, 8 here\n"
        "  train.epochs: 3.0 there, 4.0 here"
    )
    assert caught.value.fix == (
        f"--run-dir {run.folder}-2   for a new run; or, with strixft run,"
        " --from plan   repeats plan and the later stages"
    )


def test_overrides_of_a_notebook_may_be_text(recipe: Path, tmp_path: Path) -> None:
    run = open_run(recipe, tmp_path / "run", '{"train.epochs": 5}')
    assert run.recipe.train.epochs == 5


def test_the_run_folder_to_type_is_free(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x-2").mkdir()
    (tmp_path / "x-3").touch()
    assert free_name(tmp_path / "x") == tmp_path / "x-4"


def test_a_run_that_is_taken_is_left_as_it_is(recipe: Path, run: Run) -> None:
    run.once(Planned, lambda _: ({"rows": "1"}, {"fits": True}))
    mark_as_trained(run.folder)
    before = (run.folder / "recipe.yaml").read_bytes()
    with pytest.raises(RecipeError):
        open_run(recipe, run.folder, {"train.epochs": 4})
    assert (run.folder / "recipe.yaml").read_bytes() == before


def test_data_that_changed_since_a_training_are_refused(recipe: Path, run: Run) -> None:
    prepare(run)
    mark_as_trained(run.folder)
    source = Path(str(run.recipe.dataset.source))
    source.write_text("other rows\n")
    with pytest.raises(DataError) as caught:
        open_run(recipe, run.folder)
    assert caught.value.problem == f"{source} has changed since {run.folder} was prepared"
    assert caught.value.fix == (
        f"--run-dir {run.folder}-2, or:"
        f" strixft run {run.folder}/recipe.yaml --run-dir {run.folder} --from prepare"
    )


def test_data_that_changed_are_prepared_again_until_something_is_trained(
    recipe: Path, run: Run
) -> None:
    prepare(run)
    Path(str(run.recipe.dataset.source)).write_text("other rows\n")
    assert not open_run(recipe, run.folder).is_done("prepare")
    assert (run.folder / "prepare.1" / "result.json").is_file()


def test_data_that_changed_before_they_were_prepared_do_not_matter(recipe: Path, run: Run) -> None:
    Path(str(run.recipe.dataset.source)).write_text("other rows\n")
    assert open_run(recipe, run.folder) == run


def test_data_that_changed_are_taken_where_they_are_prepared_again(recipe: Path, run: Run) -> None:
    prepare(run)
    Path(str(run.recipe.dataset.source)).write_text("other rows\n")
    assert open_run(recipe, run.folder, first="prepare") == run


def test_data_that_are_gone_do_not_hinder_what_comes_after(recipe: Path, run: Run) -> None:
    prepare(run)
    Path(str(run.recipe.dataset.source)).unlink()
    assert open_run(recipe, run.folder) == run


def test_a_folder_that_is_no_run_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter1.txt").touch()
    with pytest.raises(RecipeError) as caught:
        open_run(recipe, thesis)
    assert caught.value.problem == f"{thesis} exists and is not a run folder"
    assert caught.value.fix == f"--run-dir {thesis}-2"
    assert [path.name for path in thesis.iterdir()] == ["chapter1.txt"]


def test_a_file_is_no_run(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"rows\.jsonl exists and is not a run folder"):
        open_run(recipe, tmp_path / "rows.jsonl")


def test_an_empty_folder_becomes_a_run(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert open_run(recipe, tmp_path / "empty").status()["state"] == "new"


def test_a_run_folder_that_cannot_be_made_says_why(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows.jsonl" / "run"
    with pytest.raises(RecipeError) as caught:
        open_run(recipe, folder)
    assert caught.value.problem == f"the run folder {folder} cannot be created: Not a directory"
    assert caught.value.fix == "--run-dir and a folder that can be written"


def test_a_run_whose_recipe_is_damaged_says_which_file(recipe: Path, run: Run) -> None:
    (run.folder / "recipe.yaml").write_text("model: [\n")
    with pytest.raises(RecipeError, match=rf"^{run.folder}/recipe\.yaml, line 2: "):
        open_run(recipe, run.folder)


# Finding.


def test_a_run_is_found_by_its_name_under_runs(recipe: Path) -> None:
    run = open_run(recipe)
    assert find_run("mine") == run


def test_a_run_is_found_by_its_folder(run: Run) -> None:
    assert find_run(run.folder) == run


def test_a_run_that_does_not_exist_is_told_how_to_list_them() -> None:
    with pytest.raises(StageError) as caught:
        find_run("nothing")
    assert caught.value.problem == "there is no run 'nothing'"
    assert caught.value.fix == "strixft runs   lists the runs"


def test_runs_are_listed_by_name_and_other_folders_are_not(recipe: Path, tmp_path: Path) -> None:
    for name in ("b", "a"):
        open_run(recipe, f"runs/{name}")
    (tmp_path / "runs" / "notes").mkdir()
    assert [run.name for run in find_runs()] == ["a", "b"]


# Doing again.


def test_stages_set_aside_keep_their_files_under_another_name(run: Run) -> None:
    prepare(run)
    set_aside(run, ("prepare", "plan"))
    assert (run.folder / "prepare.1" / "result.json").is_file()
    assert not run.is_done("prepare")


def test_stages_set_aside_twice_are_both_kept(run: Run) -> None:
    for _ in range(2):
        prepare(run)
        set_aside(run, ("prepare",))
    assert sorted(path.name for path in run.folder.glob("prepare*")) == ["prepare.1", "prepare.2"]


def test_stages_that_are_not_named_stay(run: Run) -> None:
    prepare(run)
    set_aside(run, ("plan", "train"))
    assert run.is_done("prepare")


# One owner.

HOLD = """
import sys
from strixft.run.open import find_run

with find_run(sys.argv[1]).owned():
    print("held", flush=True)
    sys.stdin.read()
"""

WORK = """
import sys
from pathlib import Path
from dataclasses import dataclass
from typing import ClassVar
from strixft.run.open import find_run
from strixft.run.folder import Result

@dataclass(frozen=True, kw_only=True)
class Prepared(Result):
    name: ClassVar[str] = "prepare"

def work(folder):
    print("at work", flush=True)
    sys.stdin.read()
    return {"rows": "1"}, {"by": "the other process"}

find_run(sys.argv[1]).once(Prepared, work)
"""


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "OWNER_ENDS_S", 0.0)


@pytest.mark.usefixtures("_impatient")
def test_a_second_process_is_refused_while_the_first_works(run: Run, start: Start) -> None:
    first = start(HOLD, run.folder)
    assert reads_line(first) == "held"
    with pytest.raises(StageError) as caught:
        run.once(Prepared, must_not_run)
    assert caught.value.problem == f"process {first.pid} is at work on {run.folder}"
    assert caught.value.fix == f"wait for it, or: strixft stop {run.folder}"


@pytest.mark.usefixtures("_impatient")
def test_stages_are_not_set_aside_while_a_process_works(run: Run, start: Start) -> None:
    prepare(run)
    assert reads_line(start(HOLD, run.folder)) == "held"
    with pytest.raises(StageError, match="is at work on"):
        set_aside(run, ("prepare",))
    assert run.is_done("prepare")


@pytest.mark.usefixtures("_impatient")
def test_a_stage_that_is_done_can_be_read_while_a_process_works(run: Run, start: Start) -> None:
    result = prepare(run)
    assert reads_line(start(HOLD, run.folder)) == "held"
    assert run.once(Prepared, must_not_run) == result


@pytest.mark.usefixtures("_impatient")
def test_a_killed_process_leaves_no_lock(run: Run, start: Start) -> None:
    first = start(HOLD, run.folder)
    assert reads_line(first) == "held"
    kill(first)
    assert prepare(run).figures == {"rows": 1}


@pytest.mark.usefixtures("_impatient")
def test_a_stage_whose_process_was_killed_is_done_again(run: Run, start: Start) -> None:
    first = start(WORK, run.folder)
    assert reads_line(first) == "at work"
    kill(first)
    assert not run.is_done("prepare")
    assert prepare(run).figures == {"rows": 1}


def test_a_stage_that_another_process_finishes_meanwhile_is_not_done_again(
    run: Run, start: Start
) -> None:
    first = start(WORK, run.folder)
    assert reads_line(first) == "at work"
    assert first.stdin
    release = threading.Timer(0.5, first.stdin.close)
    release.start()
    assert run.once(Prepared, must_not_run).figures == {"by": "the other process"}
    release.join()


def test_the_lock_is_free_again_after_a_stage(run: Run) -> None:
    prepare(run)
    with run.owned():
        assert read_owner(run.folder / ".lock") == this_process()
