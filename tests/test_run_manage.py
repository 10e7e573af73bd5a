"""Runs are listed, renamed, noted, put into a bin and back; what works is left alone."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteRecipe
from test_runs import HOLD, Start, kill, reads_line, start

from strixft.app.cli import main
from strixft.app.run_box import RunBox
from strixft.run.folder import Run
from strixft.run.manage import (
    delete_run,
    list_runs,
    note_run,
    rename_run,
    restore_run,
    run_bytes,
    run_row,
)
from strixft.run.open import find_run, open_run
from strixft.support.errors import StageError

__all__ = ["start"]  # a fixture


@pytest.fixture
def run(write_recipe: WriteRecipe) -> Run:
    """A run under `runs/` of this test's folder."""
    return open_run(write_recipe("mine"))


def enter(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What a command prints on standard output."""
    monkeypatch.setattr(sys, "argv", ["strixft", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    return capsys.readouterr().out


def test_a_run_is_renamed_and_what_it_exported_is_found(run: Run) -> None:
    result = run.folder / "export/result.json"
    result.parent.mkdir()
    path = str(run.folder / "export/mine-f16.gguf")
    result.write_text(json.dumps({"path": path, "other": f"{run.folder}-2/x"}))
    target = rename_run(run, "yours")
    assert find_run("yours").folder == target
    assert not run.folder.exists()
    told = json.loads((target / "export/result.json").read_text())
    assert told == {"path": str(target / "export/mine-f16.gguf"), "other": f"{run.folder}-2/x"}


@pytest.mark.parametrize("name", ["", " ", "a/b", "..", ".bin", "/tmp/x"])
def test_a_run_gets_no_name_that_leads_elsewhere(run: Run, name: str) -> None:
    with pytest.raises(StageError, match="is not a name for a run"):
        rename_run(run, name)


def test_a_name_that_is_taken_is_refused(run: Run, write_recipe: WriteRecipe) -> None:
    open_run(write_recipe("yours"))
    with pytest.raises(StageError, match="exists") as caught:
        rename_run(run, "yours")
    assert caught.value.fix == "choose another name: yours-2"


def test_a_deleted_run_comes_back_as_it_was(run: Run) -> None:
    (run.folder / "train").mkdir()
    (run.folder / "train/weights").write_bytes(b"x" * 1000)
    before = {path.name: path.stat().st_size for path in run.folder.rglob("*") if path.is_file()}
    target = delete_run(run.folder)
    assert target == run.folder.parent / ".bin" / "mine"
    assert list_runs() == []
    with pytest.raises(StageError, match="there is no run 'mine'"):
        find_run("mine")
    assert restore_run("mine") == run.folder
    after = {path.name: path.stat().st_size for path in run.folder.rglob("*") if path.is_file()}
    assert {name: after[name] for name in before} == before


def test_two_of_one_name_are_both_kept(run: Run, write_recipe: WriteRecipe) -> None:
    delete_run(run.folder)
    again = open_run(write_recipe("mine"))
    with pytest.raises(StageError, match="another run has the name mine") as caught:
        restore_run("mine")
    assert caught.value.fix == f"strixft rename {again.folder} mine-2   and again"
    delete_run(again.folder)
    assert sorted(path.name for path in run.folder.parent.joinpath(".bin").iterdir()) == [
        "mine",
        "mine.1",
    ]


@pytest.mark.parametrize("name", ["nothing", "../mine", "/etc"])
def test_only_what_is_in_the_bin_comes_back(run: Run, name: str) -> None:
    with pytest.raises(StageError, match="there is no run"):
        restore_run(name)
    assert run.folder.is_dir()


def test_a_run_at_work_is_left_alone(run: Run, start: Start) -> None:
    process = start(HOLD, run.folder)
    assert reads_line(process) == "held"
    began = time.monotonic()
    with pytest.raises(StageError, match=f"process {process.pid} is at work on"):
        delete_run(run.folder)
    with pytest.raises(StageError, match=f"process {process.pid} is at work on"):
        rename_run(run, "other")
    assert time.monotonic() - began < 5  # it does not wait for the end
    assert run.folder.is_dir()
    kill(process)
    assert delete_run(run.folder).is_dir()


def test_a_run_whose_recipe_is_damaged_can_be_deleted(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.folder / "recipe.yaml").write_text("model: [")
    told = json.loads(enter(capsys, monkeypatch, "delete", "mine", "--json"))
    assert Path(told["bin"]).is_dir()


def test_the_size_is_exact_and_counts_a_file_of_two_names_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 1234)
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    (tmp_path / "c").symlink_to(tmp_path / "missing")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/e").write_bytes(b"x")
    assert run_bytes(tmp_path) == 1235


def test_the_commands_do_the_same(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert enter(capsys, monkeypatch, "note", "mine") == "no note\n"
    assert enter(capsys, monkeypatch, "note", "mine", "the good one") == "the good one\n"
    assert json.loads(enter(capsys, monkeypatch, "runs", "--json"))[0]["note"] == "the good one"
    assert enter(capsys, monkeypatch, "rename", "mine", "best") == "mine is now best\n"
    deleted = enter(capsys, monkeypatch, "delete", "best")
    size = run_bytes(run.folder.with_name(".bin") / "best")
    assert deleted.splitlines()[0].startswith("best (")
    assert abs(int(deleted.split("(")[1].split(" ")[0].replace(",", "")) - size) < 200  # locks
    assert "back: strixft restore best" in deleted
    assert "best" in enter(capsys, monkeypatch, "restore")
    assert enter(capsys, monkeypatch, "restore", "best") == "best is back\n"
    assert find_run("best").folder.is_dir()


STATUSES: list[Any] = [
    {"stage": "train", "state": "done", "updated": "yesterday"},
    {"stage": None, "state": "running", "doing": [1]},
    {"state": 7},
    {"stage": "train", "state": "failed", "doing": None, "updated": None},
]


@pytest.mark.parametrize("status", STATUSES)
def test_a_run_of_another_version_is_listed_without_a_traceback(run: Run, status: Any) -> None:
    (run.folder / "status.json").write_text(json.dumps(status))
    (run.folder / "evaluate").mkdir()
    result = {"stage": "evaluate", "figures": {"metrics": {"loss": 2.0}}}
    (run.folder / "evaluate/result.json").write_text(json.dumps(result))
    (row,) = list_runs()
    assert len(run_row(row)) == 8


def test_a_folder_that_vanishes_meanwhile_is_no_obstacle(run: Run) -> None:
    note_run(run, "x")
    shutil.rmtree(run.folder)
    assert list_runs() == []


def test_the_list_in_a_notebook_deletes_and_brings_back(run: Run, start: Start) -> None:
    box = RunBox()
    assert "0 runs are chosen" in press(box, "Rename")
    assert "no run is chosen" in press(box, "Delete")
    tick(box, "mine")
    box.text.value = "<b>good</b>"
    assert "note written" in press(box, "Note")
    assert "&lt;b&gt;good" in box.rows.children[0].children[1].value
    process = start(HOLD, run.folder)
    assert reads_line(process) == "held"
    assert f"process {process.pid} is at work" in press(box, "Delete")
    kill(process)
    assert f"{run_bytes(run.folder):,} bytes" in press(box, "Delete")
    assert box.bin.value == "mine"
    assert "mine is back" in press(box, "Restore")
    assert box.bin.value is None
    assert "the bin is empty" in press(box, "Restore")
    tick(box, "mine")
    assert "comparing takes two runs" in press(box, "Compare")
    box.text.value = "yours"
    assert "mine is now yours" in press(box, "Rename")
    assert find_run("yours").folder.is_dir()


def test_an_error_of_another_gives_the_button_back(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """unslothai/unsloth#5348: what failed in the background was never shown."""
    box = RunBox()
    tick(box, "mine")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on <device>")

    monkeypatch.setattr("strixft.app.run_box.start_on", fail)
    assert "No space left on &lt;device&gt;" in press(box, "Resume")
    assert not box.buttons["Resume"].disabled


def tick(box: RunBox, name: str) -> None:
    for line in box.rows.children:
        line.children[0].value = f">{name}<" in line.children[1].value


def press(box: RunBox, name: str) -> str:
    """Clicks a button, and returns what is told then."""
    box.told.value = ""
    box.buttons[name].click()
    deadline = time.monotonic() + 60
    while not box.told.value:
        assert time.monotonic() < deadline, name
        time.sleep(0.02)
    return str(box.told.value)
