"""Docstrings begin with a verb or a noun, never with a question word."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import strixft

QUESTIONS = {"What", "Whether", "How", "Who", "Which", "Where", "Why", "When", "Of"}


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string that stands alone, those below constants included."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text


def test_no_docstring_begins_with_a_question_word() -> None:
    files = sorted(Path(strixft.__file__).parent.rglob("*.py"))
    found = [(path, line, text) for path in files for line, text in docstrings(path)]
    assert len(found) > 1000
    wrong = [
        f"{path}:{line}: {text.strip():.60}"
        for path, line, text in found
        if text.split(maxsplit=1)[0].rstrip(",.:;") in QUESTIONS
    ]
    assert wrong == []
