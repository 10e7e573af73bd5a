"""Rows that say the same: exactly, nearly, or only in their question on two sides of the split."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from strixft.formats.messages import Chat, Message

Indices = npt.NDArray[np.int64]


NUM_PERMUTATIONS = 64

BANDS = 16
"""Rows whose words agree to about 84 % share at least one band more likely than not."""

SIMILAR = 0.8
"""Least share of common word triples (by MinHash) at which rows are near duplicates."""

_PRIME = np.uint64((1 << 31) - 1)


def first_of_each(hashes: Hashes) -> Indices:
    """For each row, the index of the first row with the same hash; its own if there is none."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    found: Indices = first[inverse].astype(np.int64)
    return found


_FACTORS = np.random.default_rng(0).integers(
    1, int(_PRIME), (2, NUM_PERMUTATIONS, 1), dtype=np.uint64
)


def sketch(text: str) -> bytes:
    """A text in 256 bytes, however long it is; texts with common words share parts of them."""
    words = text.casefold().split()
    triples = {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
    hashes = np.array([hash_text(triple) for triple in triples], dtype=np.uint64) % _PRIME
    mixed = (_FACTORS[0] * hashes + _FACTORS[1]) % _PRIME  # (64, triples)
    return bytes(mixed.min(axis=1).astype(np.uint32))


def similarity(one: bytes, others: bytes) -> float:
    """Share of word triples that a text has in common with the nearest of others, by MinHash.

    Args:
        one: The text's sketch.
        others: Sketches of any number of texts.
    """
    if not others:
        return 0.0
    known = np.frombuffer(others, np.uint32).reshape(-1, NUM_PERMUTATIONS)
    return float((known == np.frombuffer(one, np.uint32)).mean(axis=1).max())


class Sketches:
    """MinHash sketches of texts (Broder 1997), from which near duplicates are found."""

    def __init__(self) -> None:
        self._data = bytearray()

    def __len__(self) -> int:
        return len(self._data) // (4 * NUM_PERMUTATIONS)

    def add(self, sketches: bytes) -> None:
        """Append what `sketch` made, of one text or of several."""
        self._data += sketches

    def _pairs(self, sketches: npt.NDArray[np.uint32]) -> Iterator[tuple[Indices, Indices]]:
        """For each band, rows that share it with an earlier row, and the first such row."""
        width = NUM_PERMUTATIONS // BANDS
        for band in range(BANDS):
            part = np.ascontiguousarray(sketches[:, band * width : (band + 1) * width])
            keys = part.view(np.dtype((np.void, part.dtype.itemsize * width))).ravel()
            first = first_of_each(np.unique(keys, return_inverse=True)[1].astype(np.uint64))
            later = np.flatnonzero(first < np.arange(len(first)))
            yield later, first[later]

    def near(self) -> Indices:
        """For each row, the first row that it nearly repeats; its own index if there is none."""
        found = np.arange(len(self), dtype=np.int64)
        if not len(self):
            return found
        sketches = np.frombuffer(self._data, np.uint32).reshape(len(self), NUM_PERMUTATIONS)
        for later, first in self._pairs(sketches):
            alike = (sketches[later] == sketches[first]).mean(axis=1) >= SIMILAR
            np.minimum.at(found, later[alike], first[alike])
        return found


def leaks(question: Hashes, train: Indices, validation: Indices) -> list[tuple[int, int]]:
    """Validation rows whose question is trained on too: each with the first such training row."""
    if not len(train):
        return []
    order = np.argsort(question[train], kind="stable")
    known = question[train][order]
    places = np.searchsorted(known, question[validation])
    inside = places < len(known)
    same = inside & (known[np.minimum(places, len(known) - 1)] == question[validation])
    return [
        (int(row), int(train[order[place]]))
        for row, place in zip(validation[same], places[same], strict=True)
    ]


Hashes = npt.NDArray[np.uint64]


def hash_text(text: str) -> int:
    """64 bits of a text; two of a million different texts agree once in 37 million such sets."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _parts(messages: list[Message]) -> Iterator[str]:
    for message in messages:
        yield message["role"]
        yield message["content"]
        if message.get("train") is False:
            yield "not trained"
        if message.get("name"):
            yield message["name"]
        if "tool_calls" in message:
            yield json.dumps([call["function"] for call in message["tool_calls"]])


def content_hash(chat: Chat) -> int:
    """Of all that a row says; of nothing that a template, a tokenizer or a file adds."""
    parts = [chat.text] if chat.text is not None else list(_parts(chat.messages))
    if chat.tools:
        parts.append(json.dumps(chat.tools))
    if chat.rejected is not None:
        parts += _parts(chat.rejected)
    if chat.label is not None:
        parts.append(str(chat.label))
    return hash_text("\x1f".join(parts))


def question_hash(chat: Chat) -> int:
    """Of what stands before the last answer, case and spaces aside; of plain text, all of it."""
    if chat.text is not None:
        asked = chat.text
    else:
        last = max(i for i, m in enumerate(chat.messages) if m["role"] == "assistant")
        asked = "\x1f".join(message["content"] for message in chat.messages[:last])
    return hash_text(" ".join(asked.casefold().split()))


def uniform(hashes: Hashes, salt: int = 0) -> npt.NDArray[np.float64]:
    """Hashes as numbers in [0, 1); another salt gives numbers that have nothing to do with them.

    The mixing is splitmix64's (Steele, Lea and Flood, OOPSLA 2014).
    """
    if salt:
        with np.errstate(over="ignore"):
            hashes = hashes + np.uint64(salt) * np.uint64(0x9E3779B97F4A7C15)
            hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            hashes = hashes ^ (hashes >> np.uint64(31))
    mixed: npt.NDArray[np.float64] = (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return mixed


_WEIGHT = 1
"""Salt of the hash that decides which rows of a source with a weight are taken."""


@dataclass(frozen=True, slots=True)
class Split:
    """Indices of rows; with a weight above 1 a training row stands more than once."""

    train: Indices
    validation: Indices


def split_rows(
    keys: Hashes, kept: npt.NDArray[np.bool_], weights: npt.NDArray[Any], fraction: float
) -> Split:
    """Divide rows by the hash of their content, or of their group.

    A row keeps its side when the set grows. At least one row is held out where there are two
    different ones, and one is always trained.

    Args:
        keys: Rows with one key stay together.
        kept: Rows that take part.
        weights: How often one pass takes each row.
        fraction: Share that is held out.
    """
    chosen = uniform(keys, salt=_WEIGHT) < weights % 1
    times = np.where(kept, np.floor(weights).astype(np.int64) + chosen, 0)
    rows = np.flatnonzero(times)
    places = uniform(keys[rows])
    held_out = places < _limit(places, fraction)
    return Split(np.repeat(rows, times[rows])[~np.repeat(held_out, times[rows])], rows[held_out])


def _limit(places: npt.NDArray[np.float64], fraction: float) -> float:
    different = np.unique(places)
    if fraction <= 0 or len(different) < 2:
        return 0.0
    # at least the lowest, never the highest
    return float(min(max(fraction, np.nextafter(different[0], 1)), different[-1]))
