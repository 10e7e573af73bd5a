"""Measures of an answer against its reference, and which of them suit the data."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from strixft.support.errors import HostError

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
    because: str = ""
    """Why it does."""
    package: str | None = None
    """The module that it needs, of the extra `eval`."""

    def is_there(self) -> bool:
        """What it needs is installed."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


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
    from sacrebleu import sentence_chrf

    return float(sentence_chrf(answer, [reference]).score) / 100


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


def _rouge_l(answer: str, reference: str, _: str) -> float:
    return float(_rouge().score(reference, answer)["rougeL"].fmeasure)


def _are_long(references: Sequence[str]) -> bool:
    words = sum(len(text.split()) for text in references)
    return words >= LONG_WORDS * len(references) and not _mostly(_is_json)(references)


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
            because="every answer can be compared",
        ),
        Metric(
            name="json_valid",
            score=lambda answer, *_: float(_is_json(answer)),
            suits=_mostly(_is_json),
            because="most references are JSON",
        ),
        Metric(
            name="json_equal",
            score=lambda answer, reference, _: float(
                _is_json(answer) and _parsed(answer) == _parsed(reference)
            ),
            suits=_mostly(_is_json),
            because="most references are JSON",
        ),
        Metric(
            name="number",
            score=_same_number,
            suits=_mostly(_is_number),
            because="most references are numbers or end with ####",
        ),
        Metric(name="pattern", score=_same_match, suits=_never),
        Metric(
            name="chrf",
            score=_chrf,
            suits=_are_long,
            because="references are longer texts",
            package="sacrebleu",
        ),
        Metric(
            name="rouge_l",
            score=_rouge_l,
            suits=_are_long,
            because="references are longer texts",
            package="rouge_score",
        ),
    )
}
"""What a recipe's `evaluate.metrics` may name, besides `loss` and `perplexity`."""


def suiting(references: Sequence[str]) -> list[Metric]:
    """The metrics that suit references, by their shape, installed or not."""
    return [metric for metric in METRICS.values() if metric.suits(references)]


def chosen(
    asked: Literal["auto"] | Sequence[str], references: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The metrics to take, and why, in sentences.

    Args:
        asked: The recipe's `evaluate.metrics`.
        references: What the rows' answers should be.

    Raises:
        HostError: The recipe names one whose library is not installed.
    """
    if asked != "auto":
        require_libraries(asked)
        return [name for name in asked if name in METRICS], []
    suit = suiting(references)
    told = [
        f"{metric.name}: {metric.because}"
        + ("" if metric.is_there() else "; left out, it needs pip install 'strixft[eval]'")
        for metric in suit
    ]
    return [metric.name for metric in suit if metric.is_there()], told


def require_libraries(asked: Literal["auto"] | Sequence[str]) -> None:
    """Refuse metrics whose library is not installed.

    Raises:
        HostError: One is not.
    """
    named = [] if asked == "auto" else [METRICS[name] for name in asked if name in METRICS]
    missing = [metric.name for metric in named if not metric.is_there()]
    if missing:
        raise HostError(
            f"evaluate.metrics: {', '.join(missing)} needs a library that is not installed",
            fix="pip install 'strixft[eval]'",
        )


def scores(
    name: str, answers: Sequence[str], references: Sequence[str], pattern: str
) -> list[float]:
    """A metric of each answer."""
    pairs = zip(answers, references, strict=True)
    return [METRICS[name].score(answer, reference, pattern) for answer, reference in pairs]


DRAWS = 2000

NUMBERS_AT_ONCE = 2**20
"""Drawn rows that are held at once."""

BOUNDS = (2.5, 97.5)
"""Percentiles: the interval holds 95 % of the draws."""


def _means(
    changes: npt.NDArray[Any], counts: npt.NDArray[Any], generator: np.random.Generator
) -> Iterator[npt.NDArray[Any]]:
    """Mean change of every draw, so many draws at once that they fit."""
    rows = len(counts)
    at_once = max(1, NUMBERS_AT_ONCE // rows)
    for first in range(0, DRAWS, at_once):
        drawn = generator.integers(0, rows, (min(at_once, DRAWS - first), rows))
        yield changes[drawn].sum(1) / counts[drawn].sum(1)


def paired_change(
    base: Sequence[float],
    tuned: Sequence[float],
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> dict[str, float | bool]:
    """Mean change from base to tuned with its bootstrap interval (Efron, 1979), rows as units.

    Args:
        base: A value of each row.
        tuned: The same rows'.
        weights: What a row counts, such as its trained tokens; 1 if not given.
        seed: Of the draws.

    Returns:
        `change`, `low`, `high`, and `clear`: the interval leaves out zero.
    """
    counts = np.ones(len(base)) if weights is None else np.asarray(weights, dtype=float)
    changes = (np.asarray(tuned) - np.asarray(base)) * counts
    means = np.concatenate(list(_means(changes, counts, np.random.default_rng(seed))))
    low, high = (float(bound) for bound in np.percentile(means, BOUNDS))
    change = float(changes.sum() / counts.sum())
    return {"change": change, "low": low, "high": high, "clear": low > 0 or high < 0}
