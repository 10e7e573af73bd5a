"""Loss of each row, rows of like length together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from strixft.data.batches import collate, on_device
from strixft.step.update import token_losses
from strixft.support.progress import progress_bar


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


def groups_of(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Indices of rows that go together, the longest rows first.

    Args:
        lengths: Tokens of each row.
        most_tokens: Of a batch, padding counted; a row that is longer goes alone.

    >>> groups_of([3, 9, 4, 3], most_tokens=9)
    [[1], [2, 0], [3]]
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= most_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
