"""What the layers are told of the documents of packed rows, for each way to compute attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from strixft.attention.rungs import Rung, window_sizes


def documents_of(cu_seq_lens: Tensor, rows: int, length: int) -> Tensor:
    """The document each token belongs to, (B, T).

    Args:
        cu_seq_lens: Where documents begin in the rows laid end to end, and the end, (N + 1,).
        rows: B.
        length: T.
    """
    places = torch.arange(rows * length, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
    numbers = torch.bucketize(places, cu_seq_lens[1:], right=True)
    return numbers.view(rows, length)


def dense_mask(documents: Tensor, window: int | None = None) -> Tensor:
    """Which token sees which: those before it in its own document, and itself, (B, 1, T, T).

    Args:
        documents: Document numbers, (B, T).
        window: Tokens it looks back, itself included.
    """
    same = documents.unsqueeze(-1) == documents.unsqueeze(-2)  # (B, T, T)
    seen = same.tril()
    if window is not None:
        seen = seen.triu(1 - window)
    return seen.unsqueeze(1)


def block_mask(documents: Tensor, window: int | None = None) -> Any:
    """The same as a block mask of flex attention."""
    rows, length = documents.shape

    def seen(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = (query >= key) & (documents[row, query] == documents[row, key])
        return allowed if window is None else allowed & (query - key < window)

    return create_block_mask(
        seen, rows, None, length, length, device=str(documents.device), _compile=True
    )


def _mask(rung: Rung, cu_seq_lens: Tensor, shape: torch.Size, window: int | None) -> Any:
    blocks_on_meta = rung.mask == "blocks" and cu_seq_lens.is_meta  # keeps what flash keeps
    if rung.mask == "lengths" or blocks_on_meta:
        return cu_seq_lens.view(1, 1, 1, -1)  # transformers hands 4-dimensional masks on unread
    documents = documents_of(cu_seq_lens, *shape)
    return (dense_mask if rung.mask == "dense" else block_mask)(documents, window)


def attention_inputs(rung: Rung, batch: dict[str, Any], config: Any) -> dict[str, Any]:
    """What the decoder is given besides the tokens of a batch.

    Args:
        rung: How attention is computed.
        batch: See `strixft.data.Batch`.
        config: The model's configuration.
    """
    if "cu_seq_lens" not in batch:
        return {}
    cu_seq_lens, shape = batch["cu_seq_lens"], batch["input_ids"].shape
    windows = window_sizes(config)
    if rung.mask == "lengths" or len(windows) == 1:
        mask = _mask(rung, cu_seq_lens, shape, next(iter(windows.values())))
    else:
        mask = {kind: _mask(rung, cu_seq_lens, shape, size) for kind, size in windows.items()}
    found = {"position_ids": batch["position_ids"], "attention_mask": mask}
    return found | ({"max_length_q": batch["longest"]} if rung.mask == "lengths" else {})
