"""Rows that say the same: exactly, nearly, or only in their question on two sides of the split."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from strixft.data.hashes import Hashes, hash_text

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
