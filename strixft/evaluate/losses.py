"""Loss of each row, rows of like length together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from strixft.data import collate, on_device
from strixft.evaluate.batches import groups_of
from strixft.progress import progress_bar
from strixft.step import token_losses


def _losses_of(model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> list[float]:
    device = next(model.parameters()).device
    batch = on_device(collate(rows), device)
    losses = token_losses(model, batch)  # (K,)
    owners = batch["positions"] // batch["input_ids"].shape[1]  # (K,), the row of each token
    sums: Tensor = torch.zeros(len(rows), device=device).index_add_(0, owners, losses)
    found: list[float] = (sums / torch.bincount(owners, minlength=len(rows))).tolist()
    return found


def row_losses(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    most_tokens: int,
    look: Callable[[], None] = lambda: None,
) -> list[float]:
    """Loss per trained token of each row.

    Args:
        model: Base or tuned, in evaluation mode.
        rows: Token rows.
        most_tokens: Of a batch, padding counted.
        look: Called before each batch.
    """
    found: dict[int, float] = {}
    groups = groups_of([len(row["input_ids"]) for row in rows], most_tokens)
    for group in progress_bar(groups, unit="batch", desc="loss"):
        look()
        losses = _losses_of(model, [rows[index] for index in group])
        found |= dict(zip(group, losses, strict=True))
    return [found[index] for index in range(len(rows))]
