"""Batches of token rows: their order, several documents packed into one row, and their tensors.

B rows, T tokens, K trained tokens, N documents.

Packing is best fit, longest first: each document goes where it leaves the least room, so that
neither memory nor time goes to padding. Documents of one row do not see each other: positions
restart at each, and their beginnings are listed, so that attention can be closed off between them;
padding counts as a document. Rows of one chat each are padded on the right. Attention is causal, so
a real token never sees the padding, and no mask is needed; the loss is taken only at the positions
listed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from strixft.recipe.schema import Train

Indices = npt.NDArray[np.int64]

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

    def padding(self, tokens: int) -> list[int]:
        """Return the lengths of the documents that so many tokens of padding count as."""
        whole, rest = divmod(tokens, self.longest)
        return [self.longest] * whole + ([rest] if rest else [])

    def empty_row(self) -> list[int]:
        """Return the lengths of the documents that a row of padding counts as."""
        return self.padding(self.length)


@dataclass(frozen=True, slots=True)
class RowShape:
    """A micro-batch at its largest."""

    rows: int
    """B."""
    length: int
    """T."""
    trained: int
    """K."""
    packed: PackedShape | None = None
    """Set where rows are packed."""


def _packed(
    rows: Sequence[Mapping[str, Any]], shape: PackedShape | None, width: int, missing: int
) -> Batch:
    empty = shape.empty_row() if shape is not None else []
    padded = []
    for row in rows:
        room = width - int(np.sum(row["lengths"]))
        padded.append([*row["lengths"], *(shape.padding(room) if shape is not None else [room])])
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

    def origins(self, number: int) -> dict[str, list[int]]:
        """Return `file` and `row` of each document of a packed row."""
        found: dict[str, list[int]] = self._source.select_columns(["file", "row"])[
            self.packing[number].tolist()
        ]
        return found


def length_groups(
    lengths: npt.ArrayLike, rows_at_once: int, seed: int = 0, groups: int = 50
) -> Indices:
    """Return an order of rows for batches without packing: rows of a batch have like lengths.

    Shuffled rows are sorted by length within stretches of 50 batches, and the batches of a stretch
    are shuffled again; so batches are nearly free of padding, and training sees no order of length.
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


def rows_of_run(num_rows: int, train: Train, per_update: int) -> int:
    """Return the rows that a run trains: those of its updates, or of its epochs.

    Args:
        num_rows: Training rows.
        train: Names the updates, or the epochs.
        per_update: Rows of an update.
    """
    if train.max_steps is not None:
        return train.max_steps * per_update
    return rows_of_epochs(num_rows, train.epochs)


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
    rng, every = random.Random(seed), np.asarray(sizes)
    order: list[int] = []
    while len(order) < num_rows:
        first = len(order)
        order += rng.sample(range(len(sizes)), len(sizes))
        if padded and rows > 1:  # micro-batches that hold rows of two passes stay as they are
            begin, end = -(-first // rows) * rows, len(order) // rows * rows
            inside = np.asarray(order[begin:end], dtype=np.int64)
            grouped = inside[length_groups(every[inside], rows, seed + first)]
            order[begin:end] = grouped.tolist()
        if first == 0:
            needs = (np.maximum if padded else np.add).reduceat(
                every[order], range(0, len(order), rows)
            )
            start = int(needs.argmax()) * rows
            moved = min(rows, len(order) - start)  # the last one of a pass may go on in the next
            order[:moved], order[start : start + moved] = (
                order[start : start + moved],
                order[:moved],
            )
    return order[:num_rows]


def largest_batch(
    lengths: Sequence[int], trained: Sequence[int], order: Sequence[int], rows: int
) -> tuple[int, int]:
    """Return the most tokens of one row and the most trained tokens of a micro-batch."""
    batches = [order[start : start + rows] for start in range(0, len(order), rows)]
    longest = max(lengths[index] for index in order)
    return longest, max(sum(trained[index] for index in batch) for batch in batches)
