"""Chats → tokens, and which of them are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from strixft.data.mask import Masker, Piece, Span
from strixft.data.template import ChatTemplate
from strixft.data.whole import squeezed
from strixft.data.words import Encoding, Words
from strixft.formats.faults import RowFault
from strixft.formats.messages import Chat
from strixft.support.errors import DataError

Tokens = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]

CHECKED_ROWS = 256
"""Rows whose trained tokens are decoded again and compared."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One chat, or one part of it, as tokens, and the row that it comes from."""

    input_ids: Tokens
    trained: Flags
    """True for each token that counts in the loss."""
    prompt_tokens: int
    """Tokens before the last answer."""
    request: str
    """Text of the message before the last answer."""
    answer: str
    """Text of the last answer."""
    rejected: TokenRow | None = None
    """The chat with the answer that was not preferred."""
    label: bool | None = None
    file: int = 0
    """Index of the input."""
    row: int = 0
    part: int = 0
    """0, or the number of the part of a row that became several."""
    content: int = 0
    """Hash of all that the row says; `question` of what it asks, `group` of what stays together."""
    question: int = 0
    group: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


class TooLong(RowFault):
    """A chat, or a part of it, has more tokens than `max_length`.

    Args:
        num_tokens: Its tokens.
        max_length: The most that it may have.
        is_least: Nobody counted them: there are at least so many.
    """

    def __init__(self, num_tokens: int, max_length: int, *, is_least: bool = False) -> None:
        count = f"at least {num_tokens}" if is_least else f"{num_tokens}"
        super().__init__("too_long", f"has {count} tokens, max_length is {max_length}")
        self.num_tokens = num_tokens


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
                f"the tokenizer of {tokenizer.name_or_path} has no fast version, so the places of"
                " its tokens in a text are not known",
                fix="use a model with a tokenizer.json",
            )
        backend.no_truncation()
        backend.no_padding()
        self.tokenizer = tokenizer
        self.words = Words(backend) if words is None else words
        self.loss_on = loss_on
        self.max_length = max_length
        self.eos = eos
        self._maskers: dict[bool, Masker] = {}
        bos = tokenizer.bos_token_id
        begins = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        self._start_of_text: str = tokenizer.bos_token if begins else ""
        self._longest_token = 1 if max_length is None else max(map(len, tokenizer.get_vocab()))
        self.most_characters = max_length and max_length * self._longest_token
        """Longer texts surely have more tokens than `max_length`."""
        self.mask_checked = self.mask_equal = 0

    @property
    def masker(self) -> Masker:
        """The masker for chats without tools.

        Raises:
            DataError: The tokenizer has no chat template that can be used.
        """
        return self._masker_for(with_tools=False)

    def _masker_for(self, *, with_tools: bool) -> Masker:
        # as transformers chooses among several templates: rows with tools may have their own
        named = self.tokenizer.chat_template
        with_tools = with_tools and isinstance(named, dict) and "tool_use" in named
        if with_tools not in self._maskers:
            template = ChatTemplate(self.tokenizer, for_tools=with_tools)
            names = [self.tokenizer.decode([token]) for token in self.eos]
            masker = Masker(template, self.loss_on, self.tokenizer.eos_token or "", names)
            self._maskers[with_tools] = masker
        return self._maskers[with_tools]

    def text_piece(self, text: str, *, begins: bool = True, ends: bool = True) -> Piece:
        """Return plain text between the tokens with which the model's texts begin and end.

        Args:
            text: May have these tokens already.
            begins: It is the start of its row.
            ends: It is the end of its row.
        """
        start, end = self._start_of_text, self.tokenizer.eos_token or ""
        start = start if begins and not text.lstrip().startswith(start) else ""
        if end and text.rstrip().endswith(end):
            text, end = text.rstrip(), ""  # a line end after it would be trained
        whole = f"{start}{text}{end if ends else ''}"
        half = len(text) // 2  # evaluation continues the first half
        return Piece(whole, [(0, len(whole))], len(start) + half, text[:half], text[half:])

    def writes_as_text(self, chat: Chat) -> bool:
        """Check that the template has no place for the chat's functions or calls."""
        if chat.text is not None:
            return False
        return self._masker_for(with_tools=chat.tools is not None).template.writes_as_text(chat)

    def pieces(self, chat: Chat, *, rejected: bool = False) -> list[Piece] | RowFault:
        """Return the texts of a chat with what is trained of them, or why there are none."""
        if rejected:
            chat = replace(chat, messages=chat.rejected or [])
        try:
            if chat.text is not None:
                return [self.text_piece(chat.text)]
            return self._masker_for(with_tools=chat.tools is not None).pieces(chat)
        except RowFault as fault:
            return fault

    def rows(self, found: Sequence[list[Piece] | RowFault]) -> list[Encoded]:
        """Return token rows of many chats, in order, or the fault of a chat that has none.

        Args:
            found: What `pieces` gave for each.
        """
        every = [one for pieces in found if not isinstance(pieces, RowFault) for one in pieces]
        texts = [piece.text for piece in every if not self._is_huge(piece)]
        stream = iter(self.words.encode_batch(texts))
        return [
            pieces
            if isinstance(pieces, RowFault)
            else [
                self._huge(piece) if self._is_huge(piece) else self._row(piece, next(stream))
                for piece in pieces
            ]
            for pieces in found
        ]

    def encode(self, chats: Sequence[Chat]) -> list[Encoded]:
        """Return token rows of chats, from text to tokens in one go."""
        return self.rows([self.pieces(chat) for chat in chats])

    def _is_huge(self, piece: Piece) -> bool:
        return self.most_characters is not None and len(piece.text) > self.most_characters

    def _huge(self, piece: Piece) -> TooLong:
        least = len(piece.text) // self._longest_token
        return TooLong(least, self.max_length or 0, is_least=True)

    def _row(self, piece: Piece, encoding: Any) -> TokenRow:
        input_ids = np.array(encoding.ids, dtype=np.int32)  # (T,)
        trained = np.zeros(len(input_ids), dtype=np.bool_)  # (T,)
        first = 0
        for span in piece.spans:
            first, end = _token_span(encoding, piece.text, span)
            trained[first:end] = True
        trained[:1] = False  # no token before the first one predicts it
        if piece.prompt_end != piece.spans[-1][0]:
            first, _ = _token_span(encoding, piece.text, (piece.prompt_end, len(piece.text)))
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


def _token_span(encoding: Any, text: str, span: Span) -> tuple[int, int]:
    """Return the tokens of a span of characters, both half-open.

    A token that begins before the span with spaces alone belongs to it: the model writes them with
    the answer. One that begins with other characters does not.
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
    """Check that a place lies within a token, behind characters of it that are not spaces."""
    if isinstance(encoding, Encoding):
        start = encoding.starts_at(place)
    else:
        token = encoding.char_to_token(place)
        start = place if token is None else encoding.token_to_chars(token)[0]
    return start < place and bool(text[start:place].strip())


def _token_from(encoding: Any, place: int, end: int) -> int | None:
    """Return the first token at a character or after it; tokenizers may leave spaces out."""
    tokens = (encoding.char_to_token(at) for at in range(place, end))
    return next((token for token in tokens if token is not None), None)
