"""Damaged files: always the right error with file and row, or a reported drop; memory bounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from damage import SEED, Case, cases

from strixft.prepare.stage import PROBLEMS_FILE, prepare_data
from strixft.recipe.load import check_recipe
from strixft.recipe.schema import Recipe
from strixft.support.errors import DataError

CASES = cases()
MOST_EXTRA_MIB = 300
"""Resident memory that a damaged file may cost: the largest row, several times over."""


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    """The embedded model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def recipe_for(source: Path, **dataset: Any) -> Recipe:
    """A recipe that reads a source, whatever it is."""
    section = {"source": str(source), "max_length": 512, "validation_fraction": 0.2, **dataset}
    return check_recipe({"model": "m", "dataset": section}, name="damaged")


def memory_mib(field: str) -> float:
    """A field of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def test_there_are_enough_damaged_files_and_they_are_always_the_same() -> None:
    assert len(CASES) >= 120
    assert len({case.name for case in CASES}) == len(CASES)
    again = cases(SEED)
    assert [(case.name, case.bad) for case in CASES] == [(case.name, case.bad) for case in again]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_damaged_file_is_told_about(case: Case, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    source = case.write(tmp_path / "in")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory_mib("VmRSS")
    if case.refused:
        with pytest.raises(DataError) as caught:
            prepare_data(recipe_for(source, max_bad_fraction=1), tmp_path / "out", tokenizer)
        assert case.refused in caught.value.problem
        assert caught.value.fix
    else:
        check_rows(case, source, tmp_path / "out", tokenizer)
    if case.large:
        assert memory_mib("VmHWM") - before < MOST_EXTRA_MIB


def check_rows(case: Case, source: Path, folder: Path, tokenizer: Any) -> None:
    """Every bad row fails the stage with its number, or is left out with it."""
    if case.bad:
        with pytest.raises(DataError) as caught:
            prepare_data(recipe_for(source), folder, tokenizer)
        for row in case.bad:
            assert f"{source.name}, row {row}: " in caught.value.problem
        left = max_fraction(case) is not None
        assert ("--set dataset.max_bad_fraction=" in caught.value.fix) == left
    fraction = max_fraction(case)
    if fraction is None:  # every row is bad: nothing is left to train on
        return
    _, figures = prepare_data(recipe_for(source, max_bad_fraction=fraction), folder, tokenizer)
    lines = (folder / PROBLEMS_FILE).read_text().splitlines()
    problems = [json.loads(line) for line in lines]
    left_out = {p["row"]: p["kind"] for p in problems if p["action"] == "left out"}
    kept = {p["row"]: p["kind"] for p in problems if p["action"] == "kept"}
    long = {row: kind for row, kind in case.noted.items() if kind == "too_long"}
    assert left_out == case.bad | long
    assert kept == {row: kind for row, kind in case.noted.items() if row not in long}
    assert {p["file"] for p in problems} <= {str(source)}
    used = figures["rows_train"] + figures["rows_validation"]
    assert used == figures["rows_read"] - len(left_out) > 0
    assert figures["rows_bad"] == len(case.bad)


def max_fraction(case: Case) -> float | None:
    """A share that allows the bad rows of a case; None where all its rows are bad."""
    return None if case.name == "parquet-numbers" else 0.7
