"""Chats → token rows, and token rows on disk: one Arrow file, memory-mapped when it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset

from strixft.data.completeness import squeezed
from strixft.data.mask import Masker, Piece, Span
from strixft.data.template import ChatTemplate
from strixft.data.word_cache import Encoding, Words
from strixft.formats.faults import RowFault
from strixft.formats.messages import Chat
from strixft.support.errors import DataError

Tokens = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]

CHECKED_ROWS = 256
"""Rows whose trained tokens are decoded again and compared."""

MOST_MASKERS = 64
"""Kept for different variables of the template: every row may have its own."""


@dataclass(slots=True)
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
    rejected_input_ids: Tokens | None = None
    """The chat with the answer that was not preferred."""
    rejected_trained: Flags | None = None
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

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)

    @property
    def num_trained(self) -> int:
        """Tokens that count in the loss."""
        return int(np.count_nonzero(self.trained))


SCHEMA = pa.schema(
    {
        "file": pa.int32(),
        "row": pa.int64(),
        "part": pa.int32(),
        "content": pa.uint64(),
        "question": pa.uint64(),
        "group": pa.uint64(),
        "length": pa.int32(),
        "num_trained": pa.int32(),
        "prompt_tokens": pa.int32(),
        "request": pa.string(),
        "answer": pa.string(),
        "label": pa.bool_(),
        "input_ids": pa.list_(pa.int32()),
        "trained": pa.list_(pa.bool_()),
        "rejected_input_ids": pa.list_(pa.int32()),
        "rejected_trained": pa.list_(pa.bool_()),
    }
)
"""Columns of a row file, each an attribute of `TokenRow`."""

COUNTS = ("file", "row", "content", "question", "group", "length", "num_trained")
"""Columns of numbers, which fit into memory for any data set."""


def batch_of(rows: Sequence[TokenRow]) -> pa.RecordBatch:
    """Return token rows as a piece of a row file."""
    columns = [[getattr(row, name) for row in rows] for name in SCHEMA.names]
    return pa.record_batch(columns, schema=SCHEMA)


def read_counts(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of numbers of a row file; the texts and tokens stay on disk.

    `chat` is added: a running number of the source rows, of which each may have become several.
    """
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_stream(source).read_all().select(COUNTS)
        counts = {name: table[name].to_numpy().copy() for name in COUNTS}
    places = np.stack([counts["file"].astype(np.int64), counts["row"]])
    changes = (places[:, 1:] != places[:, :-1]).any(axis=0)
    counts["chat"] = np.concatenate([np.zeros(min(1, len(places[0])), np.int64), changes.cumsum()])
    return counts


class TokenRows(NamedTuple):
    """Token rows of a prepared data set, split into training and validation."""

    train: Dataset
    validation: Dataset


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


Encoded = list[TokenRow | TooLong]
"""The rows of a chat."""


class Encoder:
    """Renders chats with a model's template and turns them into token rows.

    Args:
        tokenizer: A fast tokenizer of transformers.
        loss_on: `assistant`, `completion` (the last answer) or `all`.
        max_length: Texts that must have more tokens than this are not tokenised.
        words: Words of this tokenizer that are known already.
        eos: Tokens at which the model stops, as its files name them.
        keep_thinking: Show reasoning, and do not train it.
        template_kwargs: Variables of the chat template; those of a row come first.

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
        *,
        keep_thinking: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
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
        self.tokenizer, self.loss_on, self.eos = tokenizer, loss_on, eos
        self.words = Words(backend) if words is None else words
        self.max_length = max_length
        self._keep_thinking, self.template_kwargs = keep_thinking, dict(template_kwargs or {})
        self._maskers: dict[tuple[bool, str], Masker] = {}
        bos = tokenizer.bos_token_id
        begins = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        self._start_of_text: str = tokenizer.bos_token if begins else ""
        self._longest_token = 1 if max_length is None else max(map(len, tokenizer.get_vocab()))
        self.most_characters = max_length and max_length * self._longest_token
        """Longer texts surely have more tokens than `max_length`."""
        self.mask_checked = self.mask_equal = 0

    def masker(
        self, *, with_tools: bool = False, kwargs: Mapping[str, Any] | None = None
    ) -> Masker:
        """Return the masker for chats with tools or without, and with variables of the template.

        Raises:
            DataError: The tokenizer has no chat template that can be used.
        """
        # as transformers chooses among several templates: rows with tools may have their own
        named = self.tokenizer.chat_template
        with_tools = with_tools and isinstance(named, dict) and "tool_use" in named
        variables = {**self.template_kwargs, **(kwargs or {})}
        key = with_tools, json.dumps(variables, sort_keys=True)
        if key not in self._maskers:
            if len(self._maskers) > MOST_MASKERS:
                self._maskers.clear()
            template = ChatTemplate(self.tokenizer, for_tools=with_tools, kwargs=variables)
            names = [self.tokenizer.decode([token]) for token in self.eos]
            eos = self.tokenizer.eos_token or ""
            self._maskers[key] = Masker(
                template, self.loss_on, eos, names, keep_thinking=self._keep_thinking
            )
        return self._maskers[key]

    def masker_of(self, chat: Chat) -> Masker:
        """Return the masker for a chat.

        Raises:
            DataError: The tokenizer has no chat template that can be used.
            RowFault: The template does not read a variable of the row, or refuses its value.
        """
        with_tools = chat.tools is not None
        if not chat.template_kwargs:
            return self.masker(with_tools=with_tools)
        template = self.masker(with_tools=with_tools).template
        for name in chat.template_kwargs:
            if not template.reads(name):
                told = f"has {name!r} for the chat template, which does not read it"
                key = name if name == "enable_thinking" else "chat_template_kwargs"
                raise RowFault("not_shown", told, key)
        try:
            return self.masker(with_tools=with_tools, kwargs=chat.template_kwargs)
        except DataError as error:
            raise RowFault("template_refuses", error.problem, "chat_template_kwargs") from None

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

    def pieces(self, chat: Chat) -> list[Piece]:
        """Return the texts of a chat with what is trained of them.

        Raises:
            RowFault: The template cannot show it.
        """
        if chat.text is not None:
            return [self.text_piece(chat.text)]
        return self.masker_of(chat).pieces(chat)

    def encode(self, chats: Sequence[Chat]) -> list[Encoded | RowFault]:
        """Return the token rows of each chat, from text to tokens in one go, or its fault."""
        found: list[list[Piece] | RowFault] = []
        for chat in chats:
            try:
                found.append(self.pieces(chat))
            except RowFault as fault:
                found.append(fault)
        return self.tokenise(found)

    def tokenise(self, found: Sequence[list[Piece] | RowFault]) -> list[Encoded | RowFault]:
        """Return the token rows of each chat's texts, and faults as they are."""
        every = [one for pieces in found if not isinstance(pieces, RowFault) for one in pieces]
        texts = [piece.text for piece in every if not self._is_huge(piece)]
        stream = iter(self.words.encode_batch(texts))
        return [
            pieces
            if isinstance(pieces, RowFault)
            else [
                TooLong(len(piece.text) // self._longest_token, self.max_length or 0, is_least=True)
                if self._is_huge(piece)
                else self._row(piece, next(stream))
                for piece in pieces
            ]
            for pieces in found
        ]

    def _is_huge(self, piece: Piece) -> bool:
        return self.most_characters is not None and len(piece.text) > self.most_characters

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

    def token_from(place: int, end: int) -> int | None:
        """Return the first token at a character or after it, without one that began before it."""
        tokens = (encoding.char_to_token(at) for at in range(place, end))  # spaces may have none
        token: int | None = next((token for token in tokens if token is not None), None)
        if token is None:
            return None
        if isinstance(encoding, Encoding):
            start = encoding.starts_at(place)
        else:
            cut = encoding.char_to_token(place)
            start = place if cut is None else encoding.token_to_chars(cut)[0]
        return token + (start < place and bool(text[start:place].strip()))

    first = token_from(*span)
    if first is None:
        return 0, 0
    last = token_from(span[1], len(text))
    return first, len(encoding) if last is None else last
