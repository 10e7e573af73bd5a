"""Batches: padded token rows, and where in them the trained tokens are.

Rows are padded on the right. Attention is causal, so a real token never sees the padding, and no
mask is needed; the loss is taken only at the positions listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]
"""`input_ids` (B, T); `positions` (K,): flat places in (B, T) whose next token is trained;
`labels` (K,): that next token; `shift_labels`: the same tensor, under the name by which
transformers' Trainer counts the tokens of an update; `num_tokens` (1,): tokens without
padding."""

PAD = 0
"""Any token id: padding is never attended by a real token and never trained."""


def _place(row: Mapping[str, Any], number: int, width: int) -> list[int]:
    return [number * width + index for index, counts in enumerate(row["trained"][1:]) if counts]


def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """One batch of token rows.

    Args:
        rows: Each with `input_ids` and `trained`, lists of one length.
    """
    width = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.tensor(
        [list(row["input_ids"]) + [PAD] * (width - len(row["input_ids"])) for row in rows]
    )  # (B, T)
    positions = torch.tensor(
        [place for number, row in enumerate(rows) for place in _place(row, number, width)],
        dtype=torch.int64,
    )  # (K,)
    labels = input_ids.flatten()[positions + 1]  # (K,)
    return {
        "input_ids": input_ids,
        "positions": positions,
        "labels": labels,
        "shift_labels": labels,
        "num_tokens": torch.tensor([sum(len(row["input_ids"]) for row in rows)]),
    }


def shape_batch(num_rows: int, num_tokens: int, num_trained: int, device: str) -> Batch:
    """A batch of these shapes whose values do not matter.

    Args:
        num_rows: B.
        num_tokens: T.
        num_trained: K.
        device: Usually `meta`.
    """
    labels = torch.zeros(num_trained, dtype=torch.int64, device=device)
    return {
        "input_ids": torch.zeros(num_rows, num_tokens, dtype=torch.int64, device=device),
        "positions": torch.zeros(num_trained, dtype=torch.int64, device=device),
        "labels": labels,
        "shift_labels": labels,
        "num_tokens": torch.zeros(1, dtype=torch.int64, device=device),
    }
