"""What commands show on a real terminal: colours, folded lines, 60 columns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import WriteRecipe
from terminal import at_a_terminal

from strixft.app.printing import coloured
from strixft.run.open import open_run

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def lines_of(shown: str) -> list[str]:
    return [line.rstrip() for line in ESCAPES.sub("", shown).replace("\r", "").split("\n")]


@pytest.mark.parametrize("columns", [60, 200])
def test_a_run_is_watched_at_any_width(write_recipe: WriteRecipe, columns: int) -> None:
    run = open_run(write_recipe("mine"))
    run.set_status(stage="train", state="stopped", problem="p" * 90, fix="strixft run")
    lines = lines_of(at_a_terminal(["watch", "mine"], columns=columns))
    assert any(line.startswith("mine   prepare · plan") for line in lines)
    assert any("train: stopped" in line for line in lines)
    assert max(map(len, lines)) <= columns
    assert "".join(lines).count("p" * 40) > 0


def test_a_narrow_terminal_lists_runs_without_cutting_them(write_recipe: WriteRecipe) -> None:
    run = open_run(write_recipe("a-run-with-a-very-long-name-" + "x" * 60))
    run.set_status(stage="train", state="stopped")
    lines = lines_of(at_a_terminal(["runs"], columns=60))
    assert max(map(len, lines)) <= 60
    assert "…" not in "".join(lines)
    assert lines[0].split() == ["run", "state", "done", "updated"]
    wide = lines_of(at_a_terminal(["runs"], columns=200))
    assert wide[0].split()[:3] == ["run", "model", "stage"]


def test_an_error_is_red_on_a_terminal_and_plain_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = at_a_terminal(["runs", "nothing", "else"])
    assert "\x1b[31;1mthere is no run 'nothing'\x1b[0m" in shown
    assert coloured("x", "red") == "x"  # standard output is a file here
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31" not in at_a_terminal(["runs", "nothing", "else"])


def test_the_worst_findings_are_coloured(tmp_path: Path) -> None:
    shown = at_a_terminal(["doctor", "--no-torch"], columns=200)
    found = [line for line in shown.splitlines() if re.search(r"(WARN|FAIL)", line)]
    assert found
    assert all(line.startswith(("\x1b[33;1mWARN\x1b[0m", "\x1b[31;1mFAIL")) for line in found)


def test_a_plan_shows_that_it_works(write_recipe: WriteRecipe) -> None:
    shown = at_a_terminal(["plan", str(write_recipe())])
    assert re.search(r"planning.*\d:\d\d", shown)
