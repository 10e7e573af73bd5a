"""What a tokenizer makes of words, remembered: texts repeat their words, and asking is slow.

A tokenizer that splits text into words before it looks for tokens gives a word the same tokens
wherever it stands. So a text is cut where every such tokenizer cuts it, before a single space
between two characters that are no spaces, and only words that were not seen before are tokenised.
Whether a tokenizer is of this kind is tried out, and one text of `AUDITED_EVERY` is tokenised whole
and compared.
"""

from __future__ import annotations

import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, islice, product
from typing import Any

import numpy as np
import numpy.typing as npt

MOST_WORDS = 300_000

LONGEST_WORD = 48
"""Characters of a word that is worth remembering; most languages that need more have no spaces."""

FEWEST_TEXTS = 32
"""Fewer are tokenised whole at once."""

AUDITED_EVERY = 64

MOST_LONG = 0.5
"""Share of a batch's characters in long words above which the texts are tokenised whole."""


_SAFE = {"BPE", "WordLevel"}

_CUT = re.compile(r"(?<=\S) (?=\S)")

_SPACES = ("  ", "\n ", " \n", "\t", "\r")
"""Spaces beside spaces, where a text is not cut."""

_SPLITTERS = {"ByteLevel", "Digits", "Punctuation", "Split", "Whitespace", "WhitespaceSplit"}

_TRIED = (
    *("a", "B", "é", "ß", "中", "ا", "ह", "1", "12", "1234", "!", "...", "'", "don't", "'s", "_"),
    *(
        "-",
        ")",
        "(",
        '"',
        "$",
        "€",
        "😀",
        "a\u0301",
        "\u0301",
        "x.",
        "a,b",
        "\na",
        "a\tb",
        "1a",
        "A1",
    ),
)


class WordsDifferError(Exception):
    """A text's words gave other tokens than the text; the words are not to be trusted."""


def _state(part: Any) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(part.__getstate__())
    return state


def _splits_words(backend: Any) -> bool:
    """The parts of the tokenizer are of kinds that split words first."""
    if type(backend.model).__name__ not in _SAFE or backend.pre_tokenizer is None:
        return False
    if getattr(backend.model, "dropout", None):
        return False
    if backend.normalizer is not None and _state(backend.normalizer)["type"] != "NFC":
        return False
    state = _state(backend.pre_tokenizer)
    parts = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    return all(p["type"] in _SPLITTERS and not p.get("add_prefix_space") for p in parts)


def _cuts_before_spaces(backend: Any) -> bool:
    """No word goes over a single space, tried with pairs of all kinds of characters."""
    for left, right in product(_TRIED, _TRIED):
        for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(f"{left} {right}"):
            if start < len(left) < end:
                return False
    pairs = [(left, f" {right}") for left, right in product(_TRIED, _TRIED)]
    whole = backend.encode_batch(["".join(pair) for pair in pairs], add_special_tokens=False)
    parts = backend.encode_batch(
        [part for pair in pairs for part in pair], add_special_tokens=False
    )
    two = zip(parts[::2], parts[1::2], strict=True)
    return all(a.ids == b.ids + c.ids for a, (b, c) in zip(whole, two, strict=True))


def _plain_specials(backend: Any) -> list[str] | None:
    """Added tokens, longest first; None if one of them also takes in what stands beside it."""
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return None
    return sorted((token.content for token in added), key=len, reverse=True)


def _cut(text: str) -> list[str]:
    r"""A text in words; before each but the first stands one space.

    >>> _cut("two  words, one\n space")
    ['two  words,', 'one\n space']
    """
    if not text.isascii() or any(space in text for space in _SPACES):
        return _CUT.split(text)
    words = text.split(" ")  # the same, and several times as fast
    if not words[-1]:  # a space at the end belongs to the last word
        words[-2:] = [f"{words[-2]} "]
    return words


class Encoding:
    """The tokens of a text, put together from those of its words.

    It answers the questions of a tokenizer's own encoding that masks need.

    Args:
        texts: Stretches of the text, special tokens among them.
        parts: The same, cut into words.
        tokens: The tokens of each word of each part, as bytes of int32.
        backend: The tokenizer.
    """

    def __init__(
        self,
        texts: list[str],
        parts: list[list[str]],
        tokens: list[list[bytes]],
        backend: Any,
    ) -> None:
        joined = [b"".join(part) for part in tokens]
        self.ids: npt.NDArray[np.int32] = np.frombuffer(b"".join(joined), dtype=np.int32)
        self._parts, self._tokens, self._backend = parts, tokens, backend
        self._ends = list(accumulate(len(part) // 4 for part in joined))
        self._places = list(accumulate(map(len, texts)))
        self._seen: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def _inside(self, word: str) -> Any:
        if word not in self._seen:
            self._seen[word] = self._backend.encode(word, add_special_tokens=False)
        return self._seen[word]

    def _word_at(self, place: int) -> tuple[str, int, int, int] | None:
        """The word of a character: itself, its first character, its first token, its tokens."""
        part = bisect_right(self._places, place)
        if part == len(self._parts):
            return None
        start = self._places[part - 1] if part else 0
        token = self._ends[part - 1] if part else 0
        space = ""
        for word, tokens in zip(self._parts[part], self._tokens[part], strict=True):
            word = space + word
            if place < start + len(word):
                return word, start, token, len(tokens) // 4
            start, token, space = start + len(word), token + len(tokens) // 4, " "
        raise AssertionError("a part is shorter than its words")

    def char_to_token(self, place: int) -> int | None:
        """The token of a character; None for a space that the tokenizer leaves out."""
        found = self._word_at(place)
        if found is None:
            return None
        word, start, token, count = found
        if place == start and count:
            return token
        inside: int | None = self._inside(word).char_to_token(place - start)
        return None if inside is None else token + inside

    def starts_at(self, place: int) -> int:
        """The first character of the token of a character."""
        found = self._word_at(place)
        if found is None or found[1] == place:
            return place
        word, start, _, _ = found
        inside = self._inside(word)
        first: int = inside.token_to_chars(inside.char_to_token(place - start))[0]
        return start + first


class Words:
    """Remembers the tokens of words.

    Args:
        backend: The tokenizer, of the `tokenizers` library.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._first: dict[str, bytes] = {}
        """Tokens of words that open a stretch; the empty word, of one that begins with a space."""
        self._later: dict[str, bytes] = {}
        """Tokens of words after a space, the space included."""
        self._specials = _plain_specials(backend) if _splits_words(backend) else None
        pattern = "|".join(map(re.escape, self._specials or ())) or r"(?!)"
        self._special = re.compile(f"({pattern})")
        self._usable: bool | None = None
        self._normalizes = backend.normalizer is not None
        self._count = 0

    def distrusted(self) -> Words:
        """The same, with texts tokenised whole."""
        self._usable = False
        return self

    @property
    def usable(self) -> bool:
        """The tokenizer is one of those whose words can be remembered."""
        if self._usable is None:
            self._usable = self._specials is not None and _cuts_before_spaces(self._backend)
        return self._usable

    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        """The tokens of texts, as the tokenizer itself would give them.

        Raises:
            WordsDifferError: It would not.
        """
        if len(texts) < FEWEST_TEXTS or not self.usable or not all(map(self._is_normal, texts)):
            return self._whole(texts)
        if len(self._first) + len(self._later) > MOST_WORDS:
            self._first.clear()
            self._later.clear()
        stretches = [[part for part in self._special.split(text) if part] for text in texts]
        split = [[_cut(part) for part in parts] for parts in stretches]
        found = [self._recall(parts) for parts in split]
        unknown = [parts for parts, tokens in zip(split, found, strict=True) if tokens is None]
        if unknown:
            new = {part[0] for parts in unknown for part in parts} - self._first.keys()
            later = {word for parts in unknown for part in parts for word in part[1:]}
            later -= self._later.keys()
            long = [word for word in (*new, *later) if len(word) > LONGEST_WORD]
            if sum(map(len, long)) > MOST_LONG * sum(map(len, texts)):
                return self._whole(texts)
            self._learn(sorted(new), sorted(later))
            found = [t or self._recall(parts) for parts, t in zip(split, found, strict=True)]
            for word in long:
                self._first.pop(word, None)
                self._later.pop(word, None)
        made: list[Any] = [
            Encoding(stretch, parts, tokens or [], self._backend)
            for stretch, parts, tokens in zip(stretches, split, found, strict=True)
        ]
        self._audit(texts, made)
        return made

    def _recall(self, parts: list[list[str]]) -> list[list[bytes]] | None:
        """The tokens of each word; None if one is unknown."""
        try:
            return [
                [self._first[part[0]], *map(self._later.__getitem__, islice(part, 1, None))]
                for part in parts
            ]
        except KeyError:
            return None

    def _whole(self, texts: Sequence[str]) -> list[Any]:
        encodings: list[Any] = self._backend.encode_batch(texts, add_special_tokens=False)
        return encodings

    def _is_normal(self, text: str) -> bool:
        return not self._normalizes or text.isascii() or unicodedata.is_normalized("NFC", text)

    def _learn(self, first: list[str], later: list[str]) -> None:
        """Remember words that open a stretch, and words after a space."""
        encodings = self._whole([*first, *(f" {word}" for word in later)])
        tokens = [np.array(found.ids, dtype=np.int32).tobytes() for found in encodings]
        self._first |= dict(zip(first, tokens, strict=False))
        self._later |= dict(zip(later, tokens[len(first) :], strict=True))

    def _audit(self, texts: Sequence[str], made: Sequence[Any]) -> None:
        places = [i for i in range(len(texts)) if (self._count + i) % AUDITED_EVERY == 0]
        self._count += len(texts)
        for place, true in zip(places, self._whole([texts[i] for i in places]), strict=True):
            if true.ids != made[place].ids.tolist():
                raise WordsDifferError(texts[place][:200])
