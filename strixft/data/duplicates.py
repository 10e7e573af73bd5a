"""Find rows that say the same, exactly or nearly, and divide rows into training and validation."""

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
Hashes = npt.NDArray[np.uint64]

NUM_PERMUTATIONS = 64

BANDS = 16
"""Rows whose words agree to about 84 % share at least one band more likely than not."""

SIMILAR = 0.8
"""Least share of common word triples (by MinHash) at which rows are near duplicates."""

_PRIME = np.uint64((1 << 31) - 1)
_FACTORS = np.random.default_rng(0).integers(
    1, int(_PRIME), (2, NUM_PERMUTATIONS, 1), dtype=np.uint64
)

_WEIGHT = 1
"""Salt of the hash that decides which rows of a source with a weight are taken."""


def hash_text(text: str) -> int:
    """Return 64 bits of a text; two of a million texts agree once in 37 million such sets."""
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
    """Return the hash of all that a row says, and of nothing that a template or file adds."""
    parts = [chat.text] if chat.text is not None else list(_parts(chat.messages))
    if chat.tools:
        parts.append(json.dumps(chat.tools))
    if chat.template_kwargs:
        parts.append(json.dumps(chat.template_kwargs, sort_keys=True))
    if chat.rejected is not None:
        parts += _parts(chat.rejected)
    if chat.label is not None:
        parts.append(str(chat.label))
    return hash_text("\x1f".join(parts))


def question_hash(chat: Chat) -> int:
    """Return the hash of all before the last answer, case and spaces aside.

    Of plain text it is that of all of it.
    """
    if chat.text is not None:
        asked = chat.text
    else:
        last = max(i for i, m in enumerate(chat.messages) if m["role"] == "assistant")
        asked = "\x1f".join(message["content"] for message in chat.messages[:last])
    return hash_text(" ".join(asked.casefold().split()))


def first_of_each(hashes: npt.NDArray[Any]) -> Indices:
    """Return for each row the index of the first row with the same hash."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    found: Indices = first[inverse].astype(np.int64)
    return found


def sketch(text: str) -> bytes:
    """Return a text in 256 bytes; texts with common words share parts of them (Broder 1997)."""
    words = text.casefold().split()
    triples = {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
    hashes = np.array([hash_text(triple) for triple in triples], dtype=np.uint64) % _PRIME
    mixed = (_FACTORS[0] * hashes + _FACTORS[1]) % _PRIME  # (permutations, triples)
    return bytes(mixed.min(axis=1).astype(np.uint32))


def _rows(sketches: bytes | bytearray) -> npt.NDArray[np.uint32]:
    return np.frombuffer(sketches, np.uint32).reshape(-1, NUM_PERMUTATIONS)


def similarity(one: bytes, others: bytes) -> float:
    """Return the share of word triples that a text has in common with the nearest of others.

    Both are sketches, the second of any number of texts.
    """
    shares = (_rows(others) == _rows(one)).mean(axis=1)
    return float(shares.max(initial=0))


def near_duplicates(sketches: bytes | bytearray) -> Indices:
    """Return for each row the first row that it nearly repeats; its own index if there is none.

    Rows are compared where they share a band with an earlier row, so that nothing is held but the
    sketches: 256 bytes a row.
    """
    every = _rows(sketches)  # (rows, permutations)
    found = np.arange(len(every), dtype=np.int64)
    width = NUM_PERMUTATIONS // BANDS
    for start in range(0, NUM_PERMUTATIONS, width) if len(every) else ():
        band = np.ascontiguousarray(every[:, start : start + width])
        first = first_of_each(band.view(np.dtype((np.void, 4 * width))).ravel())
        later = np.flatnonzero(first < np.arange(len(first)))
        alike = (every[later] == every[first[later]]).mean(axis=1) >= SIMILAR
        np.minimum.at(found, later[alike], first[later][alike])
    return found


def leaks(question: Hashes, train: Indices, validation: Indices) -> list[tuple[int, int]]:
    """Return validation rows whose question is trained on, each with the first training row."""
    if not len(train):
        return []
    known, first = np.unique(question[train], return_index=True)
    places = np.searchsorted(known, question[validation]).clip(max=len(known) - 1)
    same = known[places] == question[validation]
    others = train[first[places[same]]]
    return list(zip(validation[same].tolist(), others.tolist(), strict=True))


def uniform(hashes: Hashes, salt: int = 0) -> npt.NDArray[np.float64]:
    """Return hashes as numbers in [0, 1); another salt gives numbers independent of them.

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


@dataclass(frozen=True, slots=True)
class Split:
    """Indices of rows; with a weight above 1 a training row appears more than once."""

    train: Indices
    validation: Indices


def split_rows(
    keys: Hashes, kept: npt.NDArray[np.bool_], weights: npt.NDArray[Any], fraction: float
) -> Split:
    """Divide rows by the hash of their content, or of their group.

    A row stays in its part when the set grows. At least one row is held out where there are two
    different ones, and one is always trained.

    Args:
        keys: Rows with one key stay together.
        kept: Rows that take part.
        weights: Times that one pass takes each row.
        fraction: Share that is held out.
    """
    chosen = uniform(keys, salt=_WEIGHT) < weights % 1
    times = np.where(kept, np.floor(weights).astype(np.int64) + chosen, 0)
    rows = np.flatnonzero(times)
    places = uniform(keys[rows])
    different = np.unique(places)
    limit = 0.0
    if fraction > 0 and len(different) > 1:  # at least the lowest, never the highest
        limit = min(max(fraction, np.nextafter(different[0], 1)), different[-1])
    held_out = places < limit
    return Split(np.repeat(rows, times[rows])[~np.repeat(held_out, times[rows])], rows[held_out])
