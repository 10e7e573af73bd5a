"""Measures of an answer against its reference, the choice among them, and their intervals."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from strixft.formats.messages import END_OF_REASONING
from strixft.support.errors import HostError
from strixft.support.tables import Table

MOSTLY = 0.8
"""Share of references that must have a shape before `auto` takes a metric for it."""

LONG_WORDS = 8
"""Mean words of a reference from which an exact match says little."""

INSTALL = "pip install 'strixft[eval]'"

DRAWS = 2000

NUMBERS_AT_ONCE = 2**20
"""Drawn rows that are held at once."""

BOUNDS = (2.5, 97.5)
"""Percentiles: the interval holds 95 % of the draws."""

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A measure of an answer."""

    name: str
    score: Callable[[str, str, str], float]
    """Answer, reference, the recipe's pattern → 0 to 1."""
    suits: Callable[[Sequence[str]], bool]
    """References → whether `auto` takes it for them."""
    because: str = ""
    """Reason of `auto`."""
    package: str | None = None
    """Module that it needs, of the extra `eval`."""

    def is_installed(self) -> bool:
        """Check that the module it needs is installed."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


def _parsed(text: str) -> Any:
    """Return a JSON object or array; None for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def last_number(text: str) -> float | None:
    """Return the last number of a text, where worked-out answers have theirs.

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


def _rouge_l(answer: str, reference: str, _: str) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure)


def _mostly(test: Callable[[str], bool]) -> Callable[[Sequence[str]], bool]:
    return lambda texts: sum(map(test, texts)) >= MOSTLY * len(texts)


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text.strip()) is not None or "####" in text


_are_json = _mostly(lambda text: _parsed(text) is not None)


def _are_long(references: Sequence[str]) -> bool:
    words = sum(len(text.split()) for text in references)
    return words >= LONG_WORDS * len(references) and not _are_json(references)


METRICS: Table[Metric] = Table(
    "metric",
    Metric(
        name="exact_match",
        score=lambda answer, reference, _: float(answer.strip() == reference.strip()),
        suits=lambda _: True,
        because="every answer can be compared",
    ),
    Metric(
        name="json_valid",
        score=lambda answer, *_: float(_parsed(answer) is not None),
        suits=_are_json,
        because="most references are JSON",
    ),
    Metric(
        name="json_equal",
        score=lambda a, b, _: float(_parsed(a) is not None and _parsed(a) == _parsed(b)),
        suits=_are_json,
        because="most references are JSON",
    ),
    Metric(
        name="number",
        score=_same_number,
        suits=_mostly(_is_number),
        because="most references are numbers or end with ####",
    ),
    Metric(name="pattern", score=_same_match, suits=lambda _: False),
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
"""Metrics that a recipe's `evaluate.metrics` may name, besides `loss` and `perplexity`."""


def after_reasoning(text: str) -> str:
    """Return the answer that follows reasoning; the opening tag may stand in the prompt.

    >>> after_reasoning("2 + 2</think> 4"), after_reasoning("4")
    ('4', '4')
    """
    return text.rpartition(END_OF_REASONING)[2].lstrip() if END_OF_REASONING in text else text


def choose_metrics(
    asked: Literal["auto"] | Sequence[str], references: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return the names of the metrics to take, and the reasons of `auto` in sentences.

    Raises:
        HostError: The recipe names one whose library is not installed.
    """
    if asked != "auto":
        require_libraries(asked)
        return [name for name in asked if name in METRICS], []
    final = list(map(after_reasoning, references))
    suit = [metric for metric in METRICS.values() if metric.suits(final)]
    told = [
        f"{metric.name}: {metric.because}"
        + ("" if metric.is_installed() else f"; left out, it needs {INSTALL}")
        for metric in suit
    ]
    return [metric.name for metric in suit if metric.is_installed()], told


def require_libraries(asked: Literal["auto"] | Sequence[str]) -> None:
    """Refuse metrics whose library is not installed.

    Raises:
        HostError: One is not.
    """
    named = [] if asked == "auto" else [METRICS[name] for name in asked if name in METRICS]
    missing = [metric.name for metric in named if not metric.is_installed()]
    if missing:
        raise HostError(
            f"evaluate.metrics: {', '.join(missing)} needs a library that is not installed",
            fix=INSTALL,
        )


def scores(
    name: str, answers: Sequence[str], references: Sequence[str], pattern: str
) -> list[float]:
    """Return the score of each answer by a metric; reasoning before it is not compared."""
    pairs = zip(map(after_reasoning, answers), map(after_reasoning, references), strict=True)
    return [METRICS[name].score(answer, reference, pattern) for answer, reference in pairs]


def paired_change(
    base: Sequence[float],
    tuned: Sequence[float],
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> dict[str, float | bool]:
    """Return the mean change from base to tuned with its bootstrap interval (Efron, 1979).

    Args:
        base: Value of each row, (N,).
        tuned: Value of each row, (N,).
        weights: Weight of each row, such as its trained tokens, (N,); 1 if not given.
        seed: Seed of the draws, whose units are rows.

    Returns:
        `change`, `low`, `high`, and `clear`: the interval does not hold zero.
    """
    counts = np.ones(len(base)) if weights is None else np.asarray(weights, dtype=float)
    changes = (np.asarray(tuned) - np.asarray(base)) * counts
    generator, rows = np.random.default_rng(seed), len(counts)
    at_once = max(1, NUMBERS_AT_ONCE // rows)
    means: list[npt.NDArray[Any]] = []
    for first in range(0, DRAWS, at_once):  # all draws of many rows would fill the memory
        drawn = generator.integers(0, rows, (min(at_once, DRAWS - first), rows))  # (draws, N)
        means.append(changes[drawn].sum(1) / counts[drawn].sum(1))
    low, high = (float(bound) for bound in np.percentile(np.concatenate(means), BOUNDS))
    change = float(changes.sum() / counts.sum())
    return {"change": change, "low": low, "high": high, "clear": low > 0 or high < 0}
