"""Was something forgotten? Loss on short general texts that no recipe trains on.

`general.jsonl` was written for this package and has its licence: facts, prose, talk, instructions,
mathematics, code, data, letters, and four other languages.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

TEXTS = "general.jsonl"

LONGEST = 32
"""Tokens of a text that are read: enough to tell what was forgotten, and little work."""


def general_texts() -> list[dict[str, str]]:
    """The texts: `kind`, `text`."""
    lines = resources.files(__package__).joinpath(TEXTS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def general_rows(tokenizer: Any) -> list[dict[str, Any]]:
    """The texts as token rows; every token counts but the first, which nothing predicts.

    Args:
        tokenizer: The model's.
    """
    rows = []
    for text in general_texts():
        ids = tokenizer(text["text"])["input_ids"][:LONGEST]
        rows.append({**text, "input_ids": ids, "trained": [False] + [True] * (len(ids) - 1)})
    return rows
