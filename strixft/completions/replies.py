"""Short JSON in the answer of a model, which may say more than it should."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_DECODER = json.JSONDecoder()


def text_schema(**texts: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema of an object of texts, all of them required.

    Args:
        **texts: What each of them may be, besides a text: `enum`, `maxLength`.
    """
    return {
        "type": "object",
        "properties": {name: {"type": "string", **rules} for name, rules in texts.items()},
        "required": list(texts),
        "additionalProperties": False,
    }


def find_object(text: str, names: Sequence[str]) -> dict[str, str] | None:
    """The first JSON object in a text that has all of these texts; None if there is none.

    >>> find_object('Sure: {"a": {}} or {"a": "x", "b": 1}', ["a"])
    {'a': 'x'}
    """
    start = text.find("{")
    while start >= 0:
        try:
            value, _ = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and all(isinstance(value.get(name), str) for name in names):
            return {name: value[name] for name in names}
        start = text.find("{", start + 1)
    return None
