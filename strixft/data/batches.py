"""Make batches: token rows of one length, and the places of their trained tokens.

B rows, T tokens, K trained tokens, N documents.

Rows of one chat each are padded on the right. Attention is causal, so a real token never sees the
padding, and no mask is needed; the loss is taken only at the positions listed. Packed rows hold
several documents, whose beginnings are listed, so that attention can be closed off between them;
padding counts as a document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Batch = dict[str, Any]
"""`input_ids` (B, T); `positions` (K,): flat places in (B, T) whose next token is trained;
`labels` (K,): that next token; `num_tokens`: those without padding, a plain number, so that
reading it does not wait for the device. Packed rows also have `position_ids` (B, T), which restart
at each document; `cu_seq_lens` (N + 1,), int32: the beginnings of the documents in the rows laid
end to end, and the end, repeated where there are fewer than N; and `longest`, a number that no
document exceeds."""

PAD = 0
"""Any token id: padding is never attended by a real token and never trained."""


@dataclass(frozen=True, slots=True)
class PackedShape:
    """The one shape that all packed micro-batches of a run are filled up to."""

    length: int
    """T."""
    documents: int
    """N: the most documents of a micro-batch, padding counted as one for each row."""
    longest: int
    """Tokens of the longest document, or of the longest padding."""
    rows: int = 0
    """B; a micro-batch of fewer rows is filled up with padding. 0 leaves it as it is."""

    def empty_row(self) -> list[int]:
        """Return the lengths of the documents that a row of padding counts as."""
        whole, rest = divmod(self.length, self.longest)
        return [self.longest] * whole + ([rest] if rest else [])


def _packed(
    rows: Sequence[Mapping[str, Any]], shape: PackedShape | None, width: int, missing: int
) -> Batch:
    empty = shape.empty_row() if shape is not None else []
    padded = ([*row["lengths"], width - int(np.sum(row["lengths"]))] for row in rows)
    pieces = np.array([n for row in (*padded, *[empty] * missing) for n in row if n], np.int64)
    ends = np.cumsum(pieces)
    positions = np.arange(ends[-1]) - np.repeat(ends - pieces, pieces)
    longest, documents = int(pieces.max()), len(pieces)
    if shape is not None:
        longest, documents = shape.longest, shape.documents
    bounds = np.full(documents + 1, ends[-1], dtype=np.int32)
    bounds[: len(pieces) + 1] = [0, *ends]
    return {
        "position_ids": torch.from_numpy(positions.reshape(-1, width)),
        "cu_seq_lens": torch.from_numpy(bounds),
        "longest": longest,
    }


def collate(rows: Sequence[Mapping[str, Any]], shape: PackedShape | None = None) -> Batch:
    """Return one batch of token rows, or of packed rows.

    Args:
        rows: Each with `input_ids` and `trained` of one length; packed ones also with `lengths` of
            their documents.
        shape: Filled up to by packed rows; they are as small as possible without one.
    """
    ids = [np.asarray(row["input_ids"]) for row in rows]
    width = shape.length if shape is not None else max(map(len, ids))
    missing = max(0, shape.rows - len(rows)) if shape is not None else 0
    padded = np.full((len(rows) + missing, width), PAD, dtype=np.int64)  # (B, T)
    places = []
    for number, row in enumerate(rows):
        padded[number, : len(ids[number])] = ids[number]
        places.append(np.flatnonzero(np.asarray(row["trained"])[1:]) + number * width)
    positions = np.concatenate(places)  # (K,)
    labels = torch.from_numpy(padded.reshape(-1)[positions + 1])  # (K,)
    batch: Batch = {
        "input_ids": torch.from_numpy(padded),
        "positions": torch.from_numpy(positions),
        "labels": labels,
        "num_tokens": sum(map(len, ids)),
    }
    return batch | (_packed(rows, shape, width, missing) if "lengths" in rows[0] else {})


def on_device(batch: Batch, device: str | torch.device) -> Batch:
    """Return the batch with its tensors on a device; its numbers stay with the process.

    Copies to a GPU leave from pinned memory, so that they wait for nothing launched before them.
    """
    is_gpu = torch.device(device).type == "cuda"

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.pin_memory().to(device, non_blocking=True) if is_gpu else value.to(device)

    return {name: moved(value) for name, value in batch.items()}


def shape_batch(
    num_rows: int,
    num_tokens: int,
    num_trained: int,
    device: str,
    packed: PackedShape | None = None,
) -> Batch:
    """Return a batch of these shapes whose values do not matter.

    Args:
        num_rows: B.
        num_tokens: T.
        num_trained: K.
        device: Usually `meta`.
        packed: Of packed rows.
    """
    labels = torch.zeros(num_trained, dtype=torch.int64, device=device)
    batch: Batch = {
        "input_ids": torch.zeros(num_rows, num_tokens, dtype=torch.int64, device=device),
        "positions": torch.zeros(num_trained, dtype=torch.int64, device=device),
        "labels": labels,
        "num_tokens": num_rows * num_tokens,
    }
    if packed is None:
        return batch
    bounds = torch.zeros(packed.documents + 1, dtype=torch.int32, device=device)
    return batch | {
        "position_ids": torch.zeros_like(batch["input_ids"]),
        "cu_seq_lens": bounds,
        "longest": packed.longest,
    }
