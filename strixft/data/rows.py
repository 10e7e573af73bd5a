"""Token rows on disk: one Arrow file, memory-mapped when read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from strixft.data.mask import TokenRow

FEATURES = Features(
    {
        "row": Value("int64"),
        "key": Value("float64"),
        "input_ids": List(Value("int32")),
        "trained": List(Value("bool")),
        "num_tokens": Value("int32"),
        "num_trained": Value("int32"),
        "prompt_tokens": Value("int32"),
        "request": Value("string"),
        "answer": Value("string"),
    }
)


def content_key(text: str) -> float:
    """A number in [0, 1) that depends on the content alone, so a row keeps its side of a split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def _columns(row: TokenRow) -> dict[str, Any]:
    return {
        "row": row.row,
        "key": content_key(row.text),
        "input_ids": row.input_ids,
        "trained": row.trained,
        "num_tokens": len(row.input_ids),
        "num_trained": sum(row.trained),
        "prompt_tokens": row.prompt_tokens,
        "request": row.request,
        "answer": row.answer,
    }


def write_rows(path: Path, rows: Iterable[TokenRow]) -> int:
    """Write token rows to an Arrow file; returns how many."""
    count = 0
    with ArrowWriter(path=str(path), features=FEATURES) as writer:
        for count, row in enumerate(rows, start=1):  # noqa: B007
            writer.write(_columns(row))
        writer.finalize()
    return count


@dataclass(frozen=True)
class TokenRows:
    """Token rows of a prepared data set, split into training and validation."""

    train: Dataset
    validation: Dataset

    @classmethod
    def load(cls, path: Path, validation_fraction: float) -> TokenRows:
        """Read what `write_rows` wrote; at least one row of two or more is held out."""
        rows = Dataset.from_file(str(path))
        keys = list(rows["key"])
        limit = validation_fraction
        if validation_fraction > 0 and len(set(keys)) > 1:
            limit = max(limit, min(keys) + 2**-48)
        held_out = [index for index, key in enumerate(keys) if key < limit]
        kept = [index for index, key in enumerate(keys) if key >= limit]
        return cls(rows.select(kept), rows.select(held_out))
