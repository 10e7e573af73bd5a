"""Measures of an answer against its reference, and which of them suit the data."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from strixft.errors import HostError

MOSTLY = 0.8
"""Share of references that must have a shape for a metric to be chosen by itself."""
LONG_WORDS = 8
"""Mean words of a reference from which an exact match says little."""
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")

Score = Callable[[str, str, str], float]
"""Answer, reference, the recipe's pattern → 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One measure."""

    name: str
    score: Score
    suits: Callable[[Sequence[str]], bool]
    """Whether `auto` takes it for these references."""


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_json(text: str) -> bool:
    return isinstance(_parsed(text), dict | list)


def last_number(text: str) -> float | None:
    """The last number of a text, where worked-out answers have theirs.

    >>> last_number("so 3 x 4 = 1,200.50 dollars"), last_number("none")
    (1200.5, None)
    """
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _same_number(answer: str, reference: str, _: str) -> float:
    ours, theirs = last_number(answer), last_number(reference)
    return float(ours is not None and theirs is not None and math.isclose(ours, theirs))


def _same_match(answer: str, reference: str, pattern: str) -> float:
    ours, theirs = re.search(pattern, answer), re.search(pattern, reference)
    return float(ours is not None and theirs is not None and ours.group() == theirs.group())


def _chrf(answer: str, reference: str, _: str) -> float:
    try:
        from sacrebleu import sentence_chrf
    except ImportError as error:
        raise HostError("chrf needs a library", fix="pip install 'strixft[eval]'") from error
    return float(sentence_chrf(answer, [reference]).score) / 100


def _mostly(test: Callable[[str], bool]) -> Callable[[Sequence[str]], bool]:
    return lambda texts: sum(map(test, texts)) >= MOSTLY * len(texts)


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text.strip()) is not None or "####" in text


def _never(_: Sequence[str]) -> bool:
    return False


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            name="exact_match",
            score=lambda answer, reference, _: float(answer.strip() == reference.strip()),
            suits=lambda _: True,
        ),
        Metric(
            name="json_valid",
            score=lambda answer, *_: float(_is_json(answer)),
            suits=_mostly(_is_json),
        ),
        Metric(
            name="json_equal",
            score=lambda answer, reference, _: float(
                _is_json(answer) and _parsed(answer) == _parsed(reference)
            ),
            suits=_mostly(_is_json),
        ),
        Metric(name="number", score=_same_number, suits=_mostly(_is_number)),
        Metric(name="pattern", score=_same_match, suits=_never),
        Metric(name="chrf", score=_chrf, suits=_never),
    )
}
"""What a recipe's `evaluate.metrics` may name, besides `loss` and `perplexity`."""


def suiting(references: Sequence[str]) -> list[str]:
    """The metrics that suit references, by their shape."""
    return [metric.name for metric in METRICS.values() if metric.suits(references)]


def scores(
    name: str, answers: Sequence[str], references: Sequence[str], pattern: str
) -> list[float]:
    """A metric of each answer."""
    pairs = zip(answers, references, strict=True)
    return [METRICS[name].score(answer, reference, pattern) for answer, reference in pairs]
