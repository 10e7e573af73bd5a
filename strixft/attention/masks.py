"""Masks that keep the documents of packed rows apart, in the form that each backend takes.

Shapes: B rows of T tokens, N documents in all rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers.masking_utils import sdpa_mask

from strixft.attention import recorder
from strixft.attention.backends import AttentionBackend


def documents_of(cu_seq_lens: Tensor, rows: int, length: int) -> Tensor:
    """Return the number of the document that each token belongs to, (B, T).

    Args:
        cu_seq_lens: Begins of documents in the rows laid end to end, and the end, (N + 1,).
        rows: B.
        length: T.
    """
    places = torch.arange(rows * length, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
    numbers = torch.bucketize(places, cu_seq_lens[1:], right=True)
    return numbers.view(rows, length)


def dense_mask(documents: Tensor, window: int | None = None) -> Tensor:
    """Return which tokens see which, (B, 1, T, T): their own document, up to themselves.

    Args:
        documents: Document numbers, (B, T).
        window: Tokens that a token looks back, itself included.
    """
    same = documents.unsqueeze(-1) == documents.unsqueeze(-2)  # (B, T, T)
    seen = same.tril()
    if window is not None:
        seen = seen.triu(1 - window)
    return seen.unsqueeze(1)


def block_mask(documents: Tensor, window: int | None = None) -> Any:
    """Return the same as a block mask of flex attention; arguments as `dense_mask`."""
    rows, length = documents.shape

    def seen(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = (query >= key) & (documents[row, query] == documents[row, key])
        return allowed if window is None else allowed & (query - key < window)

    return create_block_mask(
        seen, rows, None, length, length, device=str(documents.device), _compile=True
    )


@dataclass
class _PackedBatch:
    """A batch whose documents share rows, and its masks by the layers' window."""

    backend: AttentionBackend
    batch: dict[str, Any]
    made: dict[int | None, Any] = field(default_factory=dict)

    @property
    def longest(self) -> dict[str, Any]:
        """The longest document's tokens, for layers that take lengths."""
        is_needed = self.backend.mask == "lengths"
        return {"max_length_q": self.batch["longest"]} if is_needed else {}

    @property
    def numbers(self) -> dict[str, Any]:
        """The number of each token's document, (B, T), as transformers names it."""
        documents = documents_of(self.batch["cu_seq_lens"], *self.batch["input_ids"].shape)
        return {"seq_idx": documents.int()}

    def mask(self, options: dict[str, Any]) -> Any:
        """Return the mask of layers with a window; all with the same one share it."""
        window: int | None = options.get("local_size")
        if window not in self.made:
            self.made[window] = self._make(window, options)
        return self.made[window]

    def _make(self, window: int | None, options: dict[str, Any]) -> Any:
        ends: Tensor = self.batch["cu_seq_lens"]
        blocks_on_meta = self.backend.mask == "blocks" and ends.is_meta  # keeps what flash keeps
        if self.backend.mask == "lengths" or blocks_on_meta:
            return ends.view(1, 1, 1, -1)  # transformers hands 4-dimensional masks on unread
        documents = documents_of(ends, *self.batch["input_ids"].shape)
        if self.backend.mask == "blocks":
            return block_mask(documents, window)
        if window and getattr(options["config"], "attention_chunk_size", None):
            return self._chunked(documents, options["mask_function"])
        return dense_mask(documents, window)

    def _chunked(self, documents: Tensor, sees: Any) -> Tensor:
        """Ask the model's own function, by places in the document (B, T); return (B, 1, T, T)."""
        row = torch.arange(len(documents), device=documents.device).view(-1, 1, 1)
        positions = self.batch["position_ids"]  # (B, T)
        query, key = positions.unsqueeze(2), positions.unsqueeze(1)
        same = documents.unsqueeze(2) == documents.unsqueeze(1)  # (B, T, T)
        seen: Tensor = same & sees(row, 0, query, key)
        return seen.unsqueeze(1)


_packed: _PackedBatch | None = None


def make_mask(**options: Any) -> Any:
    """Make the mask that transformers asks for; documents of packed rows are kept apart.

    So it is the model that says which layers have a window, and how long it is.
    """
    if recorder.watch is not None:
        return recorder.watch.make_mask(options)
    if _packed is not None:
        return _packed.mask(options)
    return sdpa_mask(**options)


@contextlib.contextmanager
def packed_rows(
    backend: AttentionBackend, batch: dict[str, Any], *, numbered: bool = False
) -> Iterator[dict[str, Any]]:
    """Let a model keep the documents of a `strixft.data.Batch` apart in this block.

    Args:
        backend: Its attention.
        batch: The batch.
        numbered: Layers other than attention take the number of each token's document.

    Yields:
        Arguments of the decoder besides the tokens of the batch.
    """
    global _packed
    if "cu_seq_lens" not in batch:
        yield {}
        return
    before, _packed = _packed, _PackedBatch(backend, batch)
    try:
        with recorder.documents_unsought():
            numbers = _packed.numbers if numbered else {}
            yield {"position_ids": batch["position_ids"], **_packed.longest, **numbers}
    finally:
        _packed = before


def layer_inputs(
    backend: AttentionBackend, batch: dict[str, Any], window: int | None
) -> dict[str, Any]:
    """Return the arguments of one attention layer for packed rows; see `packed_rows`."""
    packed = _PackedBatch(backend, batch)
    mask = packed.mask({"local_size": window, "config": None})
    return {"attention_mask": mask, "sliding_window": window, **packed.longest}
