"""Batches: padded token rows, and where in them the trained tokens are.

Rows are padded on the right. Attention is causal, so a real token never sees the padding, and no
mask is needed; the loss is taken only at the positions listed. Packed rows hold several documents,
which `document_mask` keeps from seeing each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Batch = dict[str, Tensor]
"""`input_ids` (B, T); `positions` (K,): flat places in (B, T) whose next token is trained;
`labels` (K,): that next token; `shift_labels`: the same tensor, under the name by which
transformers' Trainer counts the tokens of an update; `num_tokens` (1,): tokens without padding.
Packed rows have besides `position_ids` (B, T), which restart at each document, and `documents`
(B, T): the document's number, -1 for padding."""

PAD = 0
"""Any token id: padding is never attended by a real token and never trained."""
NO_DOCUMENT = -1


def _documents(lengths: npt.NDArray[Any], width: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Positions and document numbers of one packed row, (T,) each; padding is like a document."""
    rest = width - int(lengths.sum())
    whole = np.append(lengths, rest)
    starts = np.repeat(np.cumsum(whole) - whole, whole)
    numbers = np.repeat([*range(len(lengths)), NO_DOCUMENT], whole)
    return np.arange(width) - starts, numbers


def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """One batch of token rows, or of packed rows.

    Args:
        rows: Each with `input_ids` and `trained` of one length; packed ones also with `lengths` of
            their documents.
    """
    ids = [np.asarray(row["input_ids"]) for row in rows]
    width = max(map(len, ids))
    padded = np.full((len(rows), width), PAD, dtype=np.int64)  # (B, T)
    places = []
    for number, row in enumerate(rows):
        padded[number, : len(ids[number])] = ids[number]
        places.append(np.flatnonzero(np.asarray(row["trained"])[1:]) + number * width)
    positions = np.concatenate(places)  # (K,)
    labels = torch.from_numpy(padded.reshape(-1)[positions + 1])  # (K,)
    batch = {
        "input_ids": torch.from_numpy(padded),
        "positions": torch.from_numpy(positions),
        "labels": labels,
        "shift_labels": labels,
        "num_tokens": torch.tensor([sum(map(len, ids))]),
    }
    if "lengths" in rows[0]:
        packed = [_documents(np.asarray(row["lengths"]), width) for row in rows]
        batch["position_ids"] = torch.from_numpy(np.stack([places for places, _ in packed]))
        batch["documents"] = torch.from_numpy(np.stack([numbers for _, numbers in packed]))
    return batch


def document_mask(documents: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Which token sees which: those before it in its own document, and itself.

    Args:
        documents: Document numbers, (B, T).
        dtype: None for true and false, as `scaled_dot_product_attention` takes it; a float type for
            numbers to add to the scores, as eager attention takes it.

    Returns:
        The mask, (B, 1, T, T). It takes B × T² bytes, or four times that in float32.
    """
    same = documents.unsqueeze(-1) == documents.unsqueeze(-2)  # (B, T, T)
    seen = same.tril().unsqueeze(1)  # (B, 1, T, T)
    if dtype is None:
        return seen
    hidden = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, hidden)


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
