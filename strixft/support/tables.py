"""Tables of rows by name; a lookup that misses suggests the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Protocol, TypeVar

from strixft.support.errors import RecipeError


class Row(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str:
        """The name that a recipe uses."""


R = TypeVar("R", bound=Row)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the fix for an unknown word.

    >>> did_you_mean("qlorra", ["full", "lora", "qlora"])
    "did you mean 'qlora'?"
    >>> did_you_mean("xyz", ["full", "lora"])
    'choose one of: full, lora'
    """
    names = list(known)
    if not names:
        return "there is nothing to choose from"
    near = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(names)}"


class Table(dict[str, R]):
    """An ordered mapping from a row's name to the row; a miss is a `RecipeError`.

    Args:
        kind: Noun for a row in error texts, such as "method".
        rows: The rows, in the order to show them.
    """

    def __init__(self, kind: str, *rows: R) -> None:
        self.kind = kind
        super().__init__((row.name, row) for row in rows)
        assert len(self) == len(rows), f"two rows of {kind} share a name"

    def __missing__(self, name: str) -> R:
        raise RecipeError(f"there is no {self.kind} {name!r}", fix=did_you_mean(name, self))
