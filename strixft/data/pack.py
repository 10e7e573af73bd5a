"""Pack several documents into one row, so that neither memory nor time goes to padding.

Best fit, longest first: each document goes where it leaves the least room. Documents of one row do
not see each other: `collate` restarts the positions at each and lists their beginnings, and
attention is closed off between them. The order of training is decided here too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Packing:
    """The rows of each packed row."""

    rows: Indices
    """Indices of the rows, packed row after packed row."""
    starts: Indices
    """Place in `rows` at which each packed row starts, and the end."""
    max_length: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> Indices:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.rows[self.starts[number] : self.starts[number + 1]]

    def __iter__(self) -> Iterator[Indices]:
        return (self[number] for number in range(len(self)))

    def fill(self, lengths: npt.NDArray[Any]) -> float:
        """Return the tokens of rows divided by the places for them."""
        places = len(self) * self.max_length
        return float(lengths[self.rows].sum(dtype=np.int64) / places) if places else 0.0


def pack(lengths: npt.ArrayLike, max_length: int, seed: int = 0) -> Packing:
    """Pack rows, best fit, longest first.

    Args:
        lengths: Tokens of each row, none above `max_length`.
        max_length: Places in a packed row.
        seed: Decides between rows of equal length, and the order of packed rows.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    bins = _best_fit(order.tolist(), sizes.tolist(), max_length)
    mixed = [bins[number] for number in rng.permutation(len(bins))]
    counts = np.array([0, *map(len, mixed)], dtype=np.int64)
    flat = np.array([row for rows in mixed for row in rows], dtype=np.int64)
    return Packing(flat, np.cumsum(counts), max_length)


def _best_fit(order: Sequence[int], sizes: Sequence[int], max_length: int) -> list[list[int]]:
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # bins by the room they have
    rooms = 0  # bit r is set where a bin has room for r tokens
    least = sizes[order[-1]] if order else 0
    for row in order:
        size = sizes[row]
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1  # the lowest bit that is set
            number = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, number = max_length, len(bins)
            bins.append([])
        bins[number].append(row)
        if (left := room - size) >= least:
            with_room[left].append(number)
            rooms |= 1 << left
    return bins


class PackedRows(Sequence[dict[str, Any]]):
    """Packed rows of a data set, put together when they are asked for.

    Each has `input_ids` and `trained` of all its documents, one after the other, and `lengths`, the
    tokens of each document: what `collate` needs.

    Args:
        rows: Token rows, a `datasets.Dataset`.
        packing: Decides which of them share a packed row.
    """

    def __init__(self, rows: Any, packing: Packing) -> None:
        self._source = rows
        self._rows = rows.select_columns(["input_ids", "trained"]).with_format("arrow")
        self.packing = packing

    def __len__(self) -> int:
        return len(self.packing)

    def sums(self, column: str) -> Indices:
        """Return the sum of a column of the rows in each packed row."""
        values = np.asarray(self._source[column], dtype=np.int64)[self.packing.rows]
        found: Indices = np.add.reduceat(values, self.packing.starts[:-1])
        return found

    def counts(self) -> Indices:
        """Return the number of documents in each packed row."""
        return np.diff(self.packing.starts)

    def longest(self) -> int:
        """Return the tokens of the longest document."""
        return int(np.asarray(self._source["length"])[self.packing.rows].max())

    def __getitem__(self, number: Any) -> Any:
        chosen = range(len(self))[number]
        return self.take(chosen) if isinstance(number, slice) else self.take([chosen])[0]

    def take(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Return several packed rows at once, which takes little longer than one."""
        if not numbers:
            return []
        rows = [self.packing[number] for number in numbers]
        table = self._rows[np.concatenate(rows).tolist()]
        ids, trained = (table[name].combine_chunks() for name in ("input_ids", "trained"))
        lengths = ids.value_lengths().to_numpy()
        documents = np.cumsum(list(map(len, rows)))[:-1]  # before each packed row
        tokens = np.cumsum(lengths)[documents - 1]
        columns = {
            "input_ids": np.split(ids.flatten().to_numpy(), tokens),
            "trained": np.split(trained.flatten().to_numpy(zero_copy_only=False), tokens),
            "lengths": np.split(lengths, documents),
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def origins(rows: Any, number: int) -> list[tuple[int, int]]:
    """Return input and row that each document of a token row or packed row comes from.

    Args:
        rows: `PackedRows`, or token rows as a `datasets.Dataset`.
        number: Index of the row.
    """
    if not isinstance(rows, PackedRows):
        return [(rows[number]["file"], rows[number]["row"])]
    indices = rows.packing[number].tolist()
    found = rows._source.select_columns(["file", "row"])[indices]
    return list(zip(found["file"], found["row"], strict=True))


def length_groups(
    lengths: npt.ArrayLike, rows_at_once: int, seed: int = 0, groups: int = 50
) -> Indices:
    """Return an order of rows for batches without packing: rows of a batch have like lengths.

    Shuffled rows are sorted by length within stretches of 50 batches, and the batches of a stretch
    are shuffled again; so batches are nearly free of padding, and training sees no order of length.

    Args:
        lengths: Tokens of each row.
        rows_at_once: Rows of a batch.
        seed: The same seed gives the same order.
        groups: Batches in a stretch.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(sizes)).astype(np.int64)
    stretch = rows_at_once * groups
    batches: list[Indices] = []
    for start in range(0, len(order), stretch):
        part = order[start : start + stretch]
        part = part[np.argsort(-sizes[part], kind="stable")]
        batches += [part[at : at + rows_at_once] for at in range(0, len(part), rows_at_once)]
    whole = [batch for batch in batches if len(batch) == rows_at_once]
    rest = [batch for batch in batches if len(batch) < rows_at_once]
    mixed = [whole[number] for number in rng.permutation(len(whole))]
    return np.concatenate([*mixed, *rest]) if len(order) else order


def rows_of_epochs(num_rows: int, epochs: float) -> int:
    """Return the rows that a run trains: each once an epoch; a fraction of one stops early."""
    return max(1, round(num_rows * epochs))


def training_order(
    sizes: Sequence[int], num_rows: int, seed: int, rows: int = 1, *, padded: bool = False
) -> list[int]:
    """Return indices of the rows in the order of training: whole shuffled passes, one by one.

    A micro-batch that needs the most memory comes first: what the allocator keeps after the first
    update is enough for the others.

    Args:
        sizes: Tokens of each row where rows are padded, trained tokens where they are packed.
        num_rows: Rows to train in all.
        seed: The same seed gives the same order.
        rows: Rows of a micro-batch.
        padded: Rows of a micro-batch are padded to one length, so similar lengths come together.
    """
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < num_rows:
        first = len(order)
        order += rng.sample(range(len(sizes)), len(sizes))
        if padded and rows > 1:
            _group_pass(order, first, sizes, rows, seed)
        if first == 0:
            _put_largest_first(order, sizes, rows, padded=padded)
    return order[:num_rows]


def _group_pass(order: list[int], first: int, sizes: Sequence[int], rows: int, seed: int) -> None:
    """Order a pass so that rows of a micro-batch have similar lengths.

    Micro-batches that also hold rows of another pass, at both ends, stay as they are.
    """
    begin, end = -(-first // rows) * rows, len(order) // rows * rows
    inside = np.asarray(order[begin:end], dtype=np.int64)
    order[begin:end] = inside[length_groups(np.asarray(sizes)[inside], rows, seed + first)].tolist()


def _put_largest_first(order: list[int], sizes: Sequence[int], rows: int, *, padded: bool) -> None:
    """Swap the first micro-batch of a pass with the one that needs the most memory."""
    in_order = np.asarray(sizes)[order]
    starts = range(0, len(order), rows)
    reduced = (np.maximum if padded else np.add).reduceat(in_order, starts)
    start = int(reduced.argmax()) * rows
    moved = min(rows, len(order) - start)  # the last one of a pass may go on in the next
    order[:moved], order[start : start + moved] = order[start : start + moved], order[:moved]


def largest_batch(
    lengths: Sequence[int], trained: Sequence[int], order: Sequence[int], rows: int
) -> tuple[int, int]:
    """Return the most tokens of one row and the most trained tokens of a micro-batch.

    Args:
        lengths: Tokens of each row.
        trained: Trained tokens of each row.
        order: Indices of the rows in the order of training.
        rows: Rows of a micro-batch.
    """
    batches = [order[start : start + rows] for start in range(0, len(order), rows)]
    longest = max(lengths[index] for index in order)
    return longest, max(sum(trained[index] for index in batch) for batch in batches)
