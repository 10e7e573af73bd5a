"""Errors for users: each states the problem and the fix to type.

StrixftError            exit code 1
├─ RecipeError   2      the YAML does not describe a run
├─ DataError     2      a row, a file or a split is not what its format says
├─ FitError      3      the run does not fit this host
├─ HostError     1      driver, kernel, memory limit or package is not ready
├─ StageError    1      a stage stopped, or an earlier one has not run yet
└─ Stopped       0      the user asked a run to stop, and nothing is lost

Texts from data, models and other libraries may hold anything: an error's text leaves out tokens and
keys, and shows control characters by their numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strixft.support.text import redact, visible

FIX = "\nfix: "


class StrixftError(Exception):
    """Base of all errors that users see without a traceback.

    Args:
        problem: The fault and its place.
        fix: A command, or a change to a named file.
        settings: Settings that the fix begins with, by dotted key; a run goes on with them.
    """

    exit_code = 1

    def __init__(
        self, problem: str, *, fix: str, settings: Mapping[str, Any] | None = None
    ) -> None:
        self.problem, self.fix = visible(redact(problem)), visible(redact(fix))
        self.settings = dict(settings or {})
        super().__init__(f"{self.problem}{FIX}{self.fix}")

    def _render_traceback_(self) -> list[str]:
        """Return the lines that a notebook shows in place of a traceback."""
        colour = "31" if self.exit_code else "33"
        return [f"\x1b[{colour};1m{self.problem}\x1b[0m", f"fix: {self.fix}"]


class RecipeError(StrixftError, ValueError):
    """The recipe does not describe a run."""

    exit_code = 2


class DataError(StrixftError, ValueError):
    """A row, a file or a split is not what its format says."""

    exit_code = 2


class FitError(StrixftError):
    """The run does not fit this host."""

    exit_code = 3


class HostError(StrixftError):
    """Driver, kernel, memory limit or package is not ready."""


class StageError(StrixftError):
    """A stage stopped, or an earlier stage has not run yet."""


class Stopped(StrixftError):
    """The user asked a run to stop; its last finished work is on disk."""

    exit_code = 0


def error_from_text(name: str, text: str) -> StrixftError | None:
    """Rebuild an error that another process raised.

    Args:
        name: Class name, such as papermill's `PapermillExecutionError.ename`.
        text: The result of `str(error)` there.

    Returns:
        The same error, or None if its class is not one of these.
    """
    problem, found, fix = text.rpartition(FIX)
    return error_of(name, problem, fix=fix) if found else None


def error_of(name: str, problem: str, **parts: Any) -> StrixftError | None:
    """Build the error of a class by its name, or None if it is not one of ours.

    Args:
        name: Class name.
        problem: As for `StrixftError`.
        parts: `fix` and `settings`, as for `StrixftError`.
    """
    ours: list[type[StrixftError]] = [StrixftError, *StrixftError.__subclasses__()]
    classes = {cls.__name__: cls for cls in ours}
    return classes[name](problem, **parts) if name in classes else None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed: in Python, in torch, or by a driver's message.

    >>> is_out_of_memory(RuntimeError("HIP error: out of memory")), is_out_of_memory(ValueError())
    (True, False)
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True  # torch's, which this module does not import
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
