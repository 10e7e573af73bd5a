"""Chats → token rows, and token rows on disk: one Arrow file, memory-mapped when it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset

from strixft.data.mask import Masker, Piece, Span
from strixft.data.template import ChatTemplate, squeezed
from strixft.data.word_cache import Encoding, Words
from strixft.formats.faults import RowFault
from strixft.formats.messages import Chat, Message
from strixft.support.errors import DataError

Tokens = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]

CHECKED_ROWS = 256
"""Rows whose trained tokens are decoded again and compared."""


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
        self.tokenizer, self.loss_on, self.eos = tokenizer, loss_on, eos
        self.words = Words(backend) if words is None else words
        self.max_length = max_length
        self._maskers: dict[bool, Masker] = {}
        bos = tokenizer.bos_token_id
        begins = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        self._start_of_text: str = tokenizer.bos_token if begins else ""
        self._longest_token = 1 if max_length is None else max(map(len, tokenizer.get_vocab()))
        self.most_characters = max_length and max_length * self._longest_token
        """Longer texts surely have more tokens than `max_length`."""
        self.mask_checked = self.mask_equal = 0

    def masker(self, *, with_tools: bool = False) -> Masker:
        """Return the masker for chats with tools or without.

        Raises:
            DataError: The tokenizer has no chat template that can be used.
        """
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

    def pieces(self, chat: Chat) -> list[Piece]:
        """Return the texts of a chat with what is trained of them.

        Raises:
            RowFault: The template cannot show it.
        """
        if chat.text is not None:
            return [self.text_piece(chat.text)]
        return self.masker(with_tools=chat.tools is not None).pieces(chat)

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


# Rows that are too long, by the recipe's policy.


def cut(row: TokenRow, max_length: int) -> TokenRow | None:
    """Return the row's start; None if nothing of it would be trained."""
    trained = row.trained[:max_length]
    if not trained.any():
        return None
    ids, prompt = row.input_ids[:max_length], min(row.prompt_tokens, max_length - 1)
    return replace(row, input_ids=ids, trained=trained, prompt_tokens=prompt)


def windows(row: TokenRow, max_length: int) -> list[TokenRow]:
    """Return plain text in stretches of `max_length`."""
    made = []
    for start in range(0, len(row), max_length):
        trained = row.trained[start : start + max_length].copy()
        trained[:1] = False
        if trained.any():
            ids = row.input_ids[start : start + max_length]
            made.append(TokenRow(ids, trained, max(1, len(ids) // 2), "", ""))
    return made


def stretches(encoder: Encoder, text: str) -> Iterator[TokenRow]:
    """Yield the rows of a text that is too long for the tokenizer, one stretch at a time.

    The tokens of a row of 16 MiB would take a gigabyte.
    """
    size = (encoder.most_characters or len(text)) // 2
    for start in range(0, len(text), size):
        part = text[start : start + size]
        piece = encoder.text_piece(part, begins=not start, ends=start + size >= len(text))
        (found,) = encoder.tokenise([[piece]])
        if isinstance(found, list):
            yield from (row for row in found if isinstance(row, TokenRow))


def halves(chat: Chat) -> tuple[Chat, Chat] | None:
    """Divide a chat between exchanges into two, which both begin with the system message.

    Returns:
        None where there is one exchange only, or a half without an answer.
    """
    opening = [m for m in chat.messages[:1] if m["role"] in ("system", "developer")]
    exchanges: list[list[Message]] = []  # each from one user's turn to the next
    for message in chat.messages[len(opening) :]:
        if message["role"] == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)
    sizes = [sum(len(m["content"]) for m in exchange) for exchange in exchanges]
    places = range(1, len(exchanges))
    for place in sorted(places, key=lambda place: abs(sum(sizes[:place]) - sum(sizes) / 2)):
        first, second = (
            [*opening, *(m for exchange in half for m in exchange)]
            for half in (exchanges[:place], exchanges[place:])
        )
        if all(any(m["role"] == "assistant" for m in part) for part in (first, second)):
            return replace(chat, messages=first), replace(chat, messages=second)
    return None


def divide(encoder: Encoder, chat: Chat, max_length: int) -> Encoded:
    """Divide a chat that is too long into several, and cut none of its answers.

    Exchanges that are too long even alone come back as they are.

    Raises:
        RowFault: The template refuses a part.
    """
    (found,) = encoder.encode([chat])
    if isinstance(found, RowFault):
        raise found
    if all(isinstance(row, TokenRow) and len(row) <= max_length for row in found):
        return found
    if chat.text is not None:
        short = [row for row in found if isinstance(row, TokenRow)]
        rows = short or stretches(encoder, chat.text)
        return [part for row in rows for part in windows(row, max_length)]
    parts = halves(chat)
    if parts is None:
        return found
    return [row for part in parts for row in divide(encoder, part, max_length)]


def shorten(
    encoder: Encoder,
    chat: Chat,
    found: Encoded,
    policy: str,
    note: Callable[[str, str, str], None],
) -> Encoded:
    """Return the rows of a chat, none above the encoder's `max_length`, by the recipe's policy.

    `note` gets kind, text and action of each change.

    Raises:
        RowFault: The template refuses a part.
    """
    most = encoder.max_length
    if most is None or all(isinstance(one, TokenRow) and len(one) <= most for one in found):
        return found
    if policy == "split" and chat.rejected is None:
        parts = divide(encoder, chat, most)
        if len(parts) > len(found):
            note("split", f"has more than {most} tokens, now {len(parts)} rows", "split")
        found = parts
    made: Encoded = []
    for one in found:
        if policy == "truncate" and isinstance(one, TooLong) and chat.text is not None:
            one = next(stretches(encoder, chat.text), one)
        if isinstance(one, TokenRow) and len(one) > most:
            start = cut(one, most) if policy == "truncate" else None
            if start is not None:
                note("cut", f"has {len(one)} tokens, cut to {most}", "cut")
            one = TooLong(len(one), most) if start is None else start
        made.append(one)
    return made
