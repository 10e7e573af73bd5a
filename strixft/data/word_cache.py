"""Remember the tokens of words: texts repeat their words, and asking a tokenizer is slow.

A tokenizer that splits text into words before it looks for tokens gives a word the same tokens
in any text. So a text is cut where every such tokenizer cuts it, before a single space
between two other characters, and only new words are tokenised. That a tokenizer is of this kind is
tried out, and one text of `AUDITED_EVERY` is tokenised whole and compared. What it buys is measured
in docs/data.md.
"""

from __future__ import annotations

import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, product
from typing import Any

import numpy as np
import numpy.typing as npt

MOST_CHARACTERS = 3_000_000
"""Characters of the words that are remembered; then all are forgotten."""

LONGEST_WORD = 48
"""Characters of a word that is worth remembering; most languages that need more have no spaces."""

MOST_LONG = 0.5
"""Share of a batch's characters in long new words above which the texts are tokenised whole."""

FEWEST_TEXTS = 32
"""Fewer are tokenised whole at once."""

AUDITED_EVERY = 64
_CUT = re.compile(r"(?<=\S)(?= \S)")

_SPACES = ("  ", "\n ", " \n", "\t", "\r", "\0")
"""Spaces beside spaces, where a text is not cut."""

_SPLITTERS = {"ByteLevel", "Digits", "Punctuation", "Split", "Whitespace", "WhitespaceSplit"}

_TRIED = [
    *"aBéß中اह1!_-)($€😀'\"\u0301",
    *("12", "1234", "...", "don't", "'s", "x.", "a,b", "1a", "A1", "a\u0301", "\na", "a\tb"),
]


class WordsDifferError(Exception):
    """A text's words gave other tokens than the text; the words are not to be trusted."""


def _splits_words(backend: Any) -> bool:
    """Check that the parts of the tokenizer are of kinds that split words first."""
    if type(backend.model).__name__ not in ("BPE", "WordLevel") or backend.pre_tokenizer is None:
        return False
    if getattr(backend.model, "dropout", None):
        return False
    normalizer = backend.normalizer
    if normalizer is not None and json.loads(normalizer.__getstate__())["type"] != "NFC":
        return False
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return False  # such a token includes the spaces around it
    state = json.loads(backend.pre_tokenizer.__getstate__())
    parts = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    return all(p["type"] in _SPLITTERS and not p.get("add_prefix_space") for p in parts)


def _cuts_before_spaces(backend: Any) -> bool:
    """Check that no word goes over a single space, with pairs of all kinds of characters."""
    pairs = list(product(_TRIED, _TRIED))
    for left, right in pairs:
        for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(f"{left} {right}"):
            if start < len(left) < end:
                return False
    texts = [text for a, b in pairs for text in (f"{a} {b}", a, f" {b}")]
    ids = [found.ids for found in backend.encode_batch(texts, add_special_tokens=False)]
    return all(ids[i] == ids[i + 1] + ids[i + 2] for i in range(0, len(ids), 3))


def _cut(text: str) -> list[str]:
    r"""Cut a text into words, each with the space before it.

    >>> _cut("two  words, one\n space")
    ['two  words,', ' one\n space']
    """
    if not text.isascii() or text[-1:] == " " or any(space in text for space in _SPACES):
        return _CUT.split(text)
    return text.replace(" ", "\0 ").split("\0")  # the same, and several times as fast


class Encoding:
    """The tokens of a text, put together from those of its words.

    It answers what masks ask of a tokenizer's own encoding; `tokens` are bytes of int32.
    """

    def __init__(self, words: list[str], tokens: list[bytes], backend: Any) -> None:
        self.ids: npt.NDArray[np.int32] = np.frombuffer(b"".join(tokens), dtype=np.int32)
        self._words, self._tokens, self._backend = words, tokens, backend
        self._ends: list[int] = []

    def __len__(self) -> int:
        return len(self.ids)

    def _at(self, place: int) -> tuple[int, int, Any]:
        """Return first character, first token and encoding of the word of a character."""
        if not self._ends:
            self._ends = list(accumulate(map(len, self._words)))
        number = bisect_right(self._ends, place)
        if number == len(self._words):
            return place, len(self), None
        start = self._ends[number] - len(self._words[number])
        token = sum(map(len, self._tokens[:number])) // 4
        if place == start and self._tokens[number]:
            return place, token, None
        return start, token, self._backend.encode(self._words[number], add_special_tokens=False)

    def char_to_token(self, place: int) -> int | None:
        """Return the token of a character; None for a space that the tokenizer leaves out."""
        start, token, word = self._at(place)
        if word is None:
            return token if token < len(self) else None
        inside: int | None = word.char_to_token(place - start)
        return None if inside is None else token + inside

    def starts_at(self, place: int) -> int:
        """Return the first character of the token of a character."""
        start, _, word = self._at(place)
        inside = None if word is None else word.char_to_token(place - start)
        return place if inside is None else start + int(word.token_to_chars(inside)[0])


class Words:
    """Remembers the tokens of words."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._known: dict[str, bytes] = {}
        self._num_characters = self._count = 0
        added = (token.content for token in backend.get_added_tokens_decoder().values())
        specials = "|".join(map(re.escape, sorted(added, key=len, reverse=True)))
        self._special = re.compile(f"({specials or '(?!)'})")

    @cached_property
    def usable(self) -> bool:
        """The tokenizer is one of those whose words can be remembered; False is final."""
        return _splits_words(self._backend) and _cuts_before_spaces(self._backend)

    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        """Return the tokens of texts, as the tokenizer itself would give them.

        Raises:
            WordsDifferError: It would not.
        """
        if len(texts) < FEWEST_TEXTS or not self.usable:
            return self._whole(texts)
        if self._backend.normalizer is not None and not all(
            text.isascii() or unicodedata.is_normalized("NFC", text) for text in texts
        ):
            return self._whole(texts)
        if self._num_characters > MOST_CHARACTERS:
            self._known.clear()
            self._num_characters = 0
        split = [
            [word for part in self._special.split(text) if part for word in _cut(part)]
            for text in texts
        ]
        found: list[list[Any]] = [list(map(self._known.get, words)) for words in split]
        unknown = [number for number, tokens in enumerate(found) if None in tokens]
        if unknown:
            new = sorted(
                {word for number in unknown for word in split[number]} - self._known.keys()
            )
            long = sum(len(word) for word in new if len(word) > LONGEST_WORD)
            if long > MOST_LONG * sum(map(len, texts)):
                return self._whole(texts)
            for word, tokens in zip(new, self._whole(new), strict=True):
                self._known[word] = np.array(tokens.ids, dtype=np.int32).tobytes()
            self._num_characters += sum(map(len, new))
            for number in unknown:
                found[number] = [self._known[word] for word in split[number]]
        made = [Encoding(*one, self._backend) for one in zip(split, found, strict=True)]
        places = [i for i in range(len(texts)) if (self._count + i) % AUDITED_EVERY == 0]
        self._count += len(texts)
        for place, true in zip(places, self._whole([texts[i] for i in places]), strict=True):
            if true.ids != made[place].ids.tolist():
                raise WordsDifferError(texts[place][:200])
        return made

    def _whole(self, texts: Sequence[str]) -> list[Any]:
        encodings: list[Any] = self._backend.encode_batch(texts, add_special_tokens=False)
        return encodings
