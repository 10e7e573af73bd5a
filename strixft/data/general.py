"""Short general texts whose loss tells what a training makes a model forget.

`general.jsonl` was written for this package and has its licence: facts, prose, talk, instructions,
mathematics, code, data, letters, and four other languages. No recipe trains on it.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

LONGEST = 32
"""Tokens read of a general text: enough to tell what was forgotten, and little work."""


def general_texts() -> list[dict[str, str]]:
    """Return the general texts: `kind`, `text`."""
    file = resources.files(__package__).joinpath("general.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def general_rows(tokenizer: Any) -> list[dict[str, Any]]:
    """Return the general texts as token rows; all tokens but the first count in the loss."""
    rows = []
    for text in general_texts():
        ids = tokenizer(text["text"])["input_ids"][:LONGEST]
        # no token stands before the first one to predict it from
        rows.append({**text, "input_ids": ids, "trained": [False] + [True] * (len(ids) - 1)})
    return rows
