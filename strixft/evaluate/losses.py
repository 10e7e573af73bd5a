"""Loss of each row.

Shapes: B rows, T tokens of the longest, K trained tokens of the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from strixft.data.batches import collate, on_device
from strixft.model import expert_counts
from strixft.step.update import token_losses
from strixft.support.progress import progress_bar


def row_losses(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    most_tokens: int,
    look: Callable[[], None] = lambda: None,
) -> list[float]:
    """Return the loss per trained token of each row; rows of similar length go together.

    Args:
        model: Base or tuned, in evaluation mode.
        rows: Token rows.
        most_tokens: Largest batch in tokens, padding included.
        look: Called before each batch.
    """
    device = next(model.parameters()).device
    found = [0.0] * len(rows)
    groups = groups_of([len(row["input_ids"]) for row in rows], most_tokens)
    for group in progress_bar(groups, unit="batch", desc="loss"):
        look()
        batch = on_device(collate([rows[index] for index in group]), device)  # ids (B, T)
        width = batch["input_ids"].shape[1]
        lengths = torch.tensor([len(rows[index]["input_ids"]) for index in group], device=device)
        real = torch.arange(width, device=device) < lengths.unsqueeze(1)  # (B, T)
        with expert_counts.watch.among(real) if expert_counts.watch else contextlib.nullcontext():
            losses = token_losses(model, batch)  # (K,)
        owners = batch["positions"] // width  # (K,), the row of each token
        sums: Tensor = torch.zeros(len(group), device=device).index_add_(0, owners, losses)  # (B,)
        means = (sums / torch.bincount(owners, minlength=len(group))).tolist()
        for index, mean in zip(group, means, strict=True):
            found[index] = mean
    return found


def groups_of(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Group indices of rows into batches, the longest rows first.

    Args:
        lengths: Tokens of each row.
        most_tokens: Largest batch, padding included; a row that is longer goes alone.

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
