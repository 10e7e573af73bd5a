"""Errors carry a problem, a fix and an exit code, and survive a process border."""

import subprocess
import sys

import pytest

from strixft.support.errors import (
    DataError,
    FitError,
    HostError,
    RecipeError,
    StageError,
    Stopped,
    StrixftError,
    error_from_text,
)

CODES: dict[type[StrixftError], int] = {
    StrixftError: 1,
    RecipeError: 2,
    DataError: 2,
    FitError: 3,
    HostError: 1,
    StageError: 1,
    Stopped: 0,
}


@pytest.mark.parametrize(("kind", "code"), CODES.items(), ids=lambda value: str(value))
def test_a_kind_of_error_has_its_exit_code(kind: type[StrixftError], code: int) -> None:
    assert kind("problem", fix="fix").exit_code == code


def test_every_kind_of_error_is_in_the_list_above() -> None:
    assert {StrixftError, *StrixftError.__subclasses__()} == set(CODES)


def test_the_text_of_an_error_ends_with_its_fix() -> None:
    assert str(DataError("row 3 is empty", fix="delete it")) == "row 3 is empty\nfix: delete it"


@pytest.mark.parametrize("kind", CODES)
def test_an_error_is_rebuilt_from_its_text(kind: type[StrixftError]) -> None:
    error = kind("two faults:\n  first\n  second", fix="type this\n     then: that")
    rebuilt = error_from_text(kind.__name__, str(error))
    assert rebuilt is not None
    assert (type(rebuilt), rebuilt.problem, rebuilt.fix) == (kind, error.problem, error.fix)


def test_a_fix_inside_a_problem_stays_in_the_problem() -> None:
    rebuilt = error_from_text("StageError", "outer: inner\nfix: a\nfix: b")
    assert rebuilt is not None
    assert (rebuilt.problem, rebuilt.fix) == ("outer: inner\nfix: a", "b")


def test_an_error_of_another_name_is_not_rebuilt() -> None:
    assert error_from_text("ZeroDivisionError", "division by zero\nfix: none") is None


def test_an_error_of_the_same_name_without_a_fix_is_not_ours() -> None:
    assert error_from_text("DataError", "No numeric types to aggregate") is None


def test_a_notebook_shows_an_error_without_a_traceback() -> None:
    code = (
        "from strixft.support.errors import RecipeError; raise RecipeError('bad key', fix='good')"
    )
    words = [sys.executable, "-m", "IPython", "--colors=NoColor", "-c", code]
    shown = subprocess.run(words, capture_output=True, text=True)
    lines = [line for line in (shown.stdout + shown.stderr).splitlines() if line.strip()]
    assert len(lines) == 2
    assert "bad key" in lines[0]
    assert lines[1] == "fix: good"
