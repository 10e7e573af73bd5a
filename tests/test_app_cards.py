"""Errors in a notebook are cards, whose fixes can be typed into a cell."""

from __future__ import annotations

import ast
import inspect

import pytest

import strixft
from strixft.app.cards import card, cell_fix
from strixft.app.lab import run_recipe
from strixft.support.errors import StageError, Stopped

FIXES = {
    "strixft run 'my runs/r.yaml' --run-dir 'my runs/r' --set train.epochs=2 --from plan": (
        "sx.run_recipe('my runs/r.yaml', 'my runs/r', overrides={'train.epochs': 2}, first='plan')"
    ),
    "strixft watch runs/x, or: strixft stop runs/x": (
        "sx.watch('runs/x'), or: its Stop button, or sx.runs()"
    ),
    "strixft runs   lists the runs": "sx.runs()   lists the runs",
    "did you mean 'demo'?   strixft recipe   lists them": (
        "did you mean 'demo'?   sx.list_recipes()   lists them"
    ),
    "--run-dir runs/mine-2   for a new run": "run_dir = 'runs/mine-2'   for a new run",
    "--set export.gguf=[f16,q8_0]": "overrides = {'export.gguf': ['f16', 'q8_0']}",
    "strixft doctor": "in a terminal: strixft doctor",
    "tail runs/x/output.txt   shows what it printed": (
        "tail runs/x/output.txt   shows what it printed"
    ),
}
"""Fix for a shell → the same for a cell."""


@pytest.mark.parametrize("fix", FIXES)
def test_a_fix_can_be_typed_into_a_cell(fix: str) -> None:
    assert cell_fix(fix) == FIXES[fix]


def test_what_a_cell_is_told_to_call_exists() -> None:
    calls = [
        node
        for text in FIXES.values()
        if text.startswith("sx.run_recipe")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
    ]
    assert calls
    for call in calls:
        names = [word.arg for word in call.keywords]
        assert set(names) <= set(inspect.signature(run_recipe).parameters)
    for name in ("watch", "chat", "runs", "list_recipes", "run_recipe"):
        assert name in strixft.__all__


@pytest.mark.parametrize("fix", ["strixft run 'half", "--set x", "strixft run --set", ""])
def test_a_fix_that_is_not_a_command_stays(fix: str) -> None:
    assert cell_fix(fix) in (fix, f"in a terminal: {fix}") or "sx." in cell_fix(fix)


def test_a_card_shows_text_as_text_and_folds_the_rest() -> None:
    error = StageError("no <img src=x> \x1b[2J", fix="strixft runs")
    page = card(error, "Traceback of <b>it</b> hf_" + "a1" * 17)
    assert "<img" not in page
    assert "<b>it" not in page
    assert "\x1b" not in page
    assert "hf_a1" not in page
    visible, folded = page.split("<details>")
    assert "sx.runs()" in visible
    assert "In a terminal: strixft runs" in folded
    assert "Traceback" in folded
    assert "sx-calm" in card(Stopped("it is stopped", fix="go on"))
