"""Which rows go into one batch: those of like length, within the room that the plan has."""

from __future__ import annotations

from collections.abc import Sequence


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
