"""From raw rows to token rows: format, checks, template, mask and tokens of one batch.

Nothing here knows of files or of other batches, so that any process can do it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from strixft.data import Encoder, Input, Problem, Record, TokenRow, fit, privacy
from strixft.data.account import KEPT, LEFT_OUT
from strixft.data.checks import any_of, oddities, texts_of
from strixft.data.duplicates import sketch
from strixft.data.encode import Encoded, TooLong
from strixft.data.hashes import content_hash, hash_text, question_hash
from strixft.data.load import group_of, read_row
from strixft.data.mask import Piece
from strixft.data.readers import RawRow
from strixft.data.rows import batch_of
from strixft.formats import Chat, Row, RowFault
from strixft.formats.table import NOT_WANTED
from strixft.recipe import Dataset

QUESTION = "question"
"""Value of `group_by` that keeps rows together which ask the same."""
Weight = Literal["note", "bad", "too_long", "left_out"]


@dataclass(slots=True)
class Made:
    """What became of a batch of rows."""

    batch: Any = None
    """Token rows, a `pyarrow.RecordBatch`; None if there are none."""
    problems: list[tuple[Weight, Problem, int]] = field(default_factory=list)
    """In the order of the rows: how it counts, the problem, and tokens of a row too long."""
    num_rows: int = 0
    num_tokens: int = 0
    rows_divided: int = 0
    """Rows that became several because they were too long."""
    chats_divided: int = 0
    """Chats that became several rows because the template rewrites answers."""
    unused: Counter[str] = field(default_factory=Counter)
    """Columns, and keys of messages, that are not read → rows that have them."""
    tools_as_text: bool = False
    """A chat had functions or calls for which the template has no place."""
    sketches: bytes = b""
    checked: tuple[int, int] = (0, 0)
    """Rows whose mask was checked by decoding, and those of them that were right."""


@dataclass(slots=True)
class _Item:
    row: int
    chat: Chat
    group: str | None
    pieces: list[Piece] | RowFault
    rejected: list[Piece] | RowFault | None


class _LongFault(RowFault):
    """A row that is too long, with its length."""

    def __init__(self, problem: str, num_tokens: int) -> None:
        super().__init__(fit.LONG, problem)
        self.num_tokens = num_tokens


class Maker:
    """Makes token rows of raw rows.

    Args:
        dataset: The recipe's section.
        inputs: Where the rows come from.
        encoder: Makes tokens.
    """

    def __init__(self, dataset: Dataset, inputs: Sequence[Input], encoder: Encoder) -> None:
        self.dataset, self.inputs, self.encoder = dataset, inputs, encoder
        tokenizer = encoder.tokenizer
        added = (str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
        self._specials = any_of([*tokenizer.all_special_tokens, *added])

    def make(self, file: int, raws: Sequence[RawRow]) -> Made:
        """The token rows of a batch.

        Args:
            file: Index of the input that the rows come from.
            raws: Rows as they stand there.
        """
        batch = _Batch(self, file)
        checked = self.encoder.mask_checked, self.encoder.mask_equal
        for number, raw, _ in raws:
            batch.read(number, raw)
        batch.finish()
        batch.made.checked = (
            self.encoder.mask_checked - checked[0],
            self.encoder.mask_equal - checked[1],
        )
        batch.made.num_rows = len(raws)
        return batch.made


class _Batch:
    """One batch on its way."""

    def __init__(self, maker: Maker, file: int) -> None:
        self._encoder, self._dataset = maker.encoder, maker.dataset
        self._specials, self._file, self._input = maker._specials, file, maker.inputs[file]
        self._items: list[_Item] = []
        self._sketches = bytearray()
        self.made = Made()

    def _note(
        self,
        row: int,
        kind: str,
        text: str,
        action: str,
        weight: Weight = "note",
        tokens: int = 0,
        key: str | None = None,
    ) -> None:
        problem = Problem(self._input.name, row, kind, text, action, key)
        self.made.problems.append((weight, problem, tokens))

    def _refuse(self, row: int, fault: RowFault) -> None:
        weight: Weight = "left_out" if fault.kind == NOT_WANTED else "bad"
        tokens = 0
        if isinstance(fault, _LongFault):
            weight, tokens = "too_long", fault.num_tokens
        self._note(row, fault.kind, fault.problem, LEFT_OUT, weight, tokens, fault.key)

    def read(self, number: int, raw: Row | RowFault) -> None:
        """Format, check and render one row."""
        try:
            chat: Chat | None = read_row(self._input, raw)
            assert chat is not None
            assert not isinstance(raw, RowFault)
            column = self._dataset.group_by
            group = None if column in (None, QUESTION) else group_of(raw, str(column))
            self.made.unused.update(chat.unused - {column})
            self._look(number, chat)
            chat = self._private(number, chat)
            if chat is not None:
                self._render(number, chat, group)
        except RowFault as fault:
            self._refuse(number, fault)

    def _look(self, row: int, chat: Chat) -> None:
        found: dict[str, list[str]] = {}
        for kind, text in oddities(chat, self._specials):
            found.setdefault(kind, []).append(text)
        for kind, texts in found.items():
            more = f", and {len(texts) - 1} more" if len(texts) > 1 else ""
            self._note(row, kind, texts[0] + more, KEPT)

    def _private(self, row: int, chat: Chat) -> Chat | None:
        """The chat as the recipe's policy for personal data leaves it; None if it is left out."""
        found = [one for text in texts_of(chat) for one in privacy.find(text)]
        if not found:
            return chat
        policy = self._dataset.personal_data
        action = {"report": KEPT, "mask": "masked", "drop": LEFT_OUT}[policy]
        for count, kind in enumerate(dict.fromkeys(kind for kind, _ in found)):
            shown = [text for one, text in found if one == kind]
            more = f", and {len(shown) - 1} more" if len(shown) > 1 else ""
            text = f"has what looks like {privacy.NAMES[kind]}: {shown[0]}{more}"
            weight: Weight = "left_out" if policy == "drop" and not count else "note"
            self._note(row, kind, text, action, weight)
        if policy == "drop":
            return None
        return privacy.mask_chat(chat) if policy == "mask" else chat

    def _render(self, row: int, chat: Chat, group: str | None) -> None:
        pieces = self._encoder.pieces(chat)
        paired = chat.rejected is not None
        rejected = self._encoder.pieces(chat, rejected=True) if paired else None
        self._look_at_names(row, chat, pieces)
        self.made.tools_as_text |= self._encoder.writes_as_text(chat)
        self.made.chats_divided += not isinstance(pieces, RowFault) and len(pieces) > 1
        self._items.append(_Item(row, chat, group, pieces, rejected))

    def _look_at_names(self, row: int, chat: Chat, pieces: list[Piece] | RowFault) -> None:
        """Tell of names of speakers, which few chat templates show."""
        names = {m["name"]: None for m in chat.messages if "name" in m and m["role"] != "tool"}
        text = "" if isinstance(pieces, RowFault) else "".join(piece.text for piece in pieces)
        hidden = [name for name in names if text and name not in text]
        if hidden:
            told = f"names who speaks, {hidden[0]!r}, which the chat template does not show"
            self._note(row, "name_hidden", told, KEPT)

    def finish(self) -> None:
        """Tokenise all that was read, in one go."""
        found = [item.pieces for item in self._items]
        found += [item.rejected for item in self._items if item.rejected is not None]
        encoded = self._encoder.rows(found, self._encoder.tokenize(found))
        pairs = iter(encoded[len(self._items) :])
        records: list[Record] = []
        for item, chosen in zip(self._items, encoded[: len(self._items)], strict=True):
            rejected = next(pairs) if item.rejected is not None else None
            try:
                pair = None if rejected is None else self._fitting(item, rejected)[0]
                records += self._records(item, self._fitting(item, chosen), pair)
            except RowFault as fault:
                self._refuse(item.row, fault)
        self.made.batch = batch_of(records) if records else None
        self.made.sketches = bytes(self._sketches)

    def _fitting(self, item: _Item, found: Encoded) -> list[TokenRow]:
        """Rows of a chat that are not too long, by the recipe's policy.

        Raises:
            RowFault: There is none.
        """
        if isinstance(found, RowFault):
            raise found
        most = self._dataset.max_length
        if any(not isinstance(one, TokenRow) or len(one) > most for one in found):
            found = self._shortened(item, found)
        long = [one for one in found if not isinstance(one, TokenRow) or len(one) > most]
        short = [one for one in found if isinstance(one, TokenRow) and len(one) <= most]
        if long and not short:
            raise _too_long(long[0], most)
        for one in long:
            self._refuse(item.row, _too_long(one, most))
        return short

    def _shortened(self, item: _Item, found: list[TokenRow | TooLong]) -> list[TokenRow | TooLong]:
        most, policy = self._dataset.max_length, self._dataset.too_long
        if policy == "truncate":
            return [self._cut(item, one) for one in found]
        if policy != "split" or item.chat.rejected is not None:
            return found
        parts = fit.divide(self._encoder, item.chat, most)
        if len(parts) > len(found):
            self.made.rows_divided += 1
            text = f"has more than {most} tokens, now {len(parts)} rows"
            self._note(item.row, fit.SPLIT, text, "split")
        return parts

    def _cut(self, item: _Item, one: TokenRow | TooLong) -> TokenRow | TooLong:
        most = self._dataset.max_length
        if isinstance(one, TooLong) and item.chat.text is not None:
            one = fit.start_of_text(self._encoder, item.chat.text) or one
        if isinstance(one, TooLong) or len(one) <= most:
            return one
        start = fit.cut(one, most)
        if start is None:
            return one  # nothing would be trained: left out as too long
        self._note(item.row, fit.CUT, f"has {len(one)} tokens, cut to {most}", "cut")
        return start

    def _records(
        self, item: _Item, found: Sequence[TokenRow], rejected: TokenRow | None
    ) -> list[Record]:
        found = [one for one in found if one.trained.any()]
        if not found:
            raise RowFault("nothing_to_train", "no token of it is to be trained")
        content, question = content_hash(item.chat), question_hash(item.chat)
        group = content if item.group is None else hash_text(item.group)
        group = question if self._dataset.group_by == QUESTION else group
        self.made.num_tokens += sum(map(len, found))
        if self._dataset.near_duplicates != "ignore":
            self._sketches += sketch(" ".join(texts_of(item.chat)))
        return [
            Record(
                file=self._file,
                row=item.row,
                part=part,
                content=content,
                question=question,
                group=group,
                tokens=one,
                rejected=rejected,
                label=item.chat.label,
            )
            for part, one in enumerate(found)
        ]


def _too_long(one: TokenRow | TooLong, most: int) -> _LongFault:
    if isinstance(one, TooLong):
        text = f"has at least {one.least_tokens} tokens, max_length is {most}"
        return _LongFault(text, one.least_tokens)
    return _LongFault(f"has {len(one)} tokens, max_length is {most}", len(one))
