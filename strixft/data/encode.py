"""Chats → tokens, and which of them are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from strixft.data.mask import Masker, Piece, Span
from strixft.data.template import ChatTemplate
from strixft.data.whole import squeezed
from strixft.data.words import Encoding, Words
from strixft.formats.faults import RowFault
from strixft.formats.messages import Chat, Message
from strixft.support.errors import DataError

Tokens = npt.NDArray[np.int32]

Flags = npt.NDArray[np.bool_]

CHECKED_ROWS = 256
"""Rows whose trained tokens are decoded again and compared."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One chat, or one part of it, as tokens."""

    input_ids: Tokens
    trained: Flags
    """Whether each token counts in the loss."""
    prompt_tokens: int
    """Tokens before the last answer."""
    request: str
    """Text of the message before the last answer."""
    answer: str
    """Text of the last answer."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class TooLong:
    """A text so long that nobody needs to count its tokens."""

    least_tokens: int


Encoded = list[TokenRow | TooLong] | RowFault
"""The rows of a chat, or why it has none."""


class Encoder:
    """Renders chats with a model's template and turns them into token rows.

    Args:
        tokenizer: A fast tokenizer of transformers.
        loss_on: `assistant`, `completion` (the last answer) or `all`.
        max_length: Texts that must have more tokens than this are not tokenised.
        words: Words of this tokenizer that are known already.
        eos: Tokens at which the model stops, as its files name them.

    Raises:
        DataError: The tokenizer is a slow one.
    """

    def __init__(
        self,
        tokenizer: Any,
        loss_on: str = "assistant",
        max_length: int | None = None,
        words: Words | None = None,
        eos: Sequence[int] = (),
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path} has no fast version, so nobody knows"
                " which characters its tokens stand for",
                fix="use a model with a tokenizer.json",
            )
        backend.no_truncation()
        backend.no_padding()
        self.tokenizer = tokenizer
        self.words = Words(backend) if words is None else words
        self.loss_on = loss_on
        self.eos = eos
        self._maskers: dict[bool, Masker] = {}
        self._start_of_text: str = tokenizer.bos_token if _adds_bos(tokenizer) else ""
        self._longest_token = 1 if max_length is None else longest_token(tokenizer)
        self.most_characters = max_length and max_length * self._longest_token
        """Longer texts surely have more tokens than `max_length`."""
        self.mask_checked = self.mask_equal = 0

    @property
    def masker(self) -> Masker:
        """Finds what is trained of chats.

        Raises:
            DataError: The tokenizer has no chat template that can be used.
        """
        return self._masker_for(with_tools=False)

    def _masker_for(self, *, with_tools: bool) -> Masker:
        """As transformers chooses among several templates: rows with tools may have their own."""
        named = self.tokenizer.chat_template
        with_tools = with_tools and isinstance(named, dict) and "tool_use" in named
        if with_tools not in self._maskers:
            template = ChatTemplate(self.tokenizer, for_tools=with_tools)
            names = [self.tokenizer.decode([token]) for token in self.eos]
            masker = Masker(template, self.loss_on, self.tokenizer.eos_token or "", names)
            self._maskers[with_tools] = masker
        return self._maskers[with_tools]

    def text_piece(self, text: str, *, begins: bool = True, ends: bool = True) -> Piece:
        """Plain text, between the tokens with which the model's texts begin and end.

        Args:
            text: May have these tokens already.
            begins: It is the start of its row.
            ends: It is the end of its row.
        """
        start, end = self._start_of_text, self.tokenizer.eos_token or ""
        start = start if begins and not text.lstrip().startswith(start) else ""
        if end and text.rstrip().endswith(end):
            text, end = text.rstrip(), ""  # a line end after it would be trained
        end = end if ends else ""
        whole = f"{start}{text}{end}"
        middle = len(start) + len(text) // 2  # evaluation continues the first half
        return Piece(
            whole, [(0, len(whole))], middle, text[: len(text) // 2], text[len(text) // 2 :]
        )

    def _pieces(self, chat: Chat, messages: Sequence[Message]) -> list[Piece]:
        if chat.text is not None:
            return [self.text_piece(chat.text)]
        masker = self._masker_for(with_tools=chat.tools is not None)
        return masker.pieces(messages, chat.tools)

    def writes_as_text(self, chat: Chat) -> bool:
        """Check that the template has no place for the chat's functions or calls."""
        if chat.text is not None:
            return False
        template = self._masker_for(with_tools=chat.tools is not None).template
        return template.writes_as_text(chat.messages, chat.tools)

    def pieces(self, chat: Chat, *, rejected: bool = False) -> list[Piece] | RowFault:
        """The texts of a chat with what is trained of them, or why there are none."""
        messages = (chat.rejected or []) if rejected else chat.messages
        try:
            return self._pieces(chat, messages)
        except RowFault as fault:
            return fault

    def tokenize(self, found: Sequence[list[Piece] | RowFault]) -> list[Any]:
        """What the tokenizer makes of the texts of many chats."""
        texts = [piece.text for piece in _flat(found) if not self._is_huge(piece)]
        return self.words.encode_batch(texts)

    def rows(
        self, found: Sequence[list[Piece] | RowFault], encodings: Sequence[Any]
    ) -> list[Encoded]:
        """Token rows of many chats, in order, or the fault of a chat that has none.

        Args:
            found: What `pieces` gave for each.
            encodings: What `tokenize` made of them.
        """
        stream = iter(encodings)
        return [
            pieces
            if isinstance(pieces, RowFault)
            else [
                TooLong(len(piece.text) // self._longest_token)
                if self._is_huge(piece)
                else self._row(piece, next(stream))
                for piece in pieces
            ]
            for pieces in found
        ]

    def encode(self, chats: Sequence[Chat]) -> list[Encoded]:
        """Token rows of chats, from text to tokens in one go."""
        found = [self.pieces(chat) for chat in chats]
        return self.rows(found, self.tokenize(found))

    def _is_huge(self, piece: Piece) -> bool:
        return self.most_characters is not None and len(piece.text) > self.most_characters

    def _row(self, piece: Piece, encoding: Any) -> TokenRow:
        input_ids = np.array(encoding.ids, dtype=np.int32)
        trained = np.zeros(len(input_ids), dtype=np.bool_)
        first = 0
        for span in piece.spans:
            first, end = token_span(encoding, piece.text, span)
            trained[first:end] = True
        trained[:1] = False  # nothing stands before the first token to predict it from
        if piece.prompt_end != piece.spans[-1][0]:
            first, _ = token_span(encoding, piece.text, (piece.prompt_end, len(piece.text)))
        if self.mask_checked < CHECKED_ROWS:
            self._check(piece, input_ids[trained])
        return TokenRow(input_ids, trained, max(1, first), piece.request, piece.answer)

    def _check(self, piece: Piece, trained: Tokens) -> None:
        """Decode the trained tokens; they must be the text that is meant to be trained."""
        decoded = self.tokenizer.decode(
            trained.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        meant = "".join(piece.text[start:end] for start, end in piece.spans)
        if piece.spans[0][0] == 0:  # the first token is never trained
            meant = meant[len(meant) - len(decoded) :] if meant.endswith(decoded) else meant
        self.mask_checked += 1
        self.mask_equal += squeezed(decoded) == squeezed(meant)


def _flat(found: Sequence[list[Piece] | RowFault]) -> list[Piece]:
    return [piece for pieces in found if not isinstance(pieces, RowFault) for piece in pieces]


def _adds_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def longest_token(tokenizer: Any) -> int:
    """Most characters that one token stands for."""
    return max(map(len, tokenizer.get_vocab()))


def token_span(encoding: Any, text: str, span: Span) -> tuple[int, int]:
    """The tokens of a span of characters, half-open.

    A token that begins before the span with spaces alone belongs to it: the model writes them with
    the answer. One that begins with other characters does not.

    Args:
        encoding: What the tokenizer made of the text.
        text: The text.
        span: Characters, half-open.
    """
    start, end = span
    first = _token_from(encoding, start, end)
    if first is None:
        return 0, 0
    first += _cuts_token(encoding, text, start)
    last = _token_from(encoding, end, len(text))
    if last is None:
        return first, len(encoding)
    return first, last + _cuts_token(encoding, text, end)


def _cuts_token(encoding: Any, text: str, place: int) -> bool:
    """A place lies within a token, behind some of its characters that are no spaces."""
    if isinstance(encoding, Encoding):
        start = encoding.starts_at(place)
    else:
        token = encoding.char_to_token(place)
        start = place if token is None else encoding.token_to_chars(token)[0]
    return start < place and bool(text[start:place].strip())


def _token_from(encoding: Any, place: int, end: int) -> int | None:
    """The first token at a character or after it; tokenizers may leave spaces out."""
    while place < end:
        token: int | None = encoding.char_to_token(place)
        if token is not None:
            return token
        place += 1
    return None
