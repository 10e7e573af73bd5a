"""The work of preparing: rows stream from files through checks, template and tokenizer to disk.

While the tokenizer, which needs no interpreter, works on one batch, the next one is read, checked
and rendered. Nothing of a batch stays in memory but its numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from strixft.data import (
    Encoder,
    Input,
    Problem,
    RawRow,
    Record,
    RowWriter,
    TokenRow,
    fit,
    privacy,
    read_rows,
)
from strixft.data.account import KEPT, LEFT_OUT, Account
from strixft.data.checks import oddities, texts_of
from strixft.data.duplicates import Sketches
from strixft.data.encode import Encoded, TooLong
from strixft.data.hashes import content_hash, hash_text, question_hash
from strixft.data.mask import Piece
from strixft.formats import Chat, RowFault
from strixft.formats.table import NOT_WANTED
from strixft.recipe import Dataset

ROWS_AT_ONCE = 512
CHARACTERS_AT_ONCE = 4_000_000
"""A batch ends here, so that a few huge rows do not meet in memory."""
BATCHES_AHEAD = 2

Pieces = list[Piece] | RowFault


@dataclass(slots=True)
class _Batch:
    rows: list[RawRow]
    pieces: list[Pieces]
    rejected: list[Pieces]
    """As long as `rows` for pairs, else empty."""
    encodings: Future[list[Any]] | None = None


class Work:
    """One pass over the rows of a recipe.

    Args:
        dataset: The recipe's section.
        inputs: What to read.
        encoder: Makes tokens.
        account: Gets every problem.
        writer: Gets every token row.
    """

    def __init__(
        self,
        dataset: Dataset,
        inputs: Sequence[Input],
        encoder: Encoder,
        account: Account,
        writer: RowWriter,
    ) -> None:
        self.dataset, self.inputs = dataset, inputs
        self.encoder, self.account, self.writer = encoder, account, writer
        self.sketches = Sketches() if dataset.near_duplicates != "ignore" else None
        self.num_chats = self.num_tokens = self.rows_left_out = 0
        self.rows_divided = self.chats_divided = 0
        self.tools_written = False
        plain = all(one.form.kind == "text" for one in inputs)
        self._specials = [] if plain else self._written_specials()

    def _written_specials(self) -> list[str]:
        """Special tokens that the template writes around turns."""
        template = self.encoder.masker.template
        known = self.encoder.tokenizer.all_special_tokens
        written = "".join(
            [*(frame.header + frame.lead for frame in template.frames), *template.ends]
        )
        return [token for token in known if token in written]

    def run(self) -> Iterator[int]:
        """Do the work; yields the number of rows read after each batch."""
        waiting: deque[_Batch] = deque()
        with ThreadPoolExecutor(1) as pool:
            for batch in self._batches():
                found = [*batch.pieces, *batch.rejected]
                batch.encodings = pool.submit(self.encoder.tokenize, found)
                waiting.append(batch)
                if len(waiting) >= BATCHES_AHEAD:
                    self._finish(waiting.popleft())
                    yield self.account.rows_read
            while waiting:
                self._finish(waiting.popleft())
                yield self.account.rows_read

    def notes(self) -> list[str]:
        """What became of chats in ways that their number does not show."""
        notes = []
        if self.chats_divided:
            notes.append(
                f"{self.chats_divided} chats became several rows each: the chat template leaves out"
                " the reasoning of answers, and each of them is trained whole, in a row of its own."
            )
        if self.rows_divided:
            notes.append(f"{self.rows_divided} rows were too long and became several rows each.")
        return notes

    def _rows(self) -> Iterator[RawRow]:
        group_by = None if self.dataset.group_by == "question" else self.dataset.group_by
        for number, one in enumerate(self.inputs):
            for row in read_rows(one, number, group_by):
                self.account.rows_read += 1
                if isinstance(row, RawRow):
                    yield row
                elif row.kind == NOT_WANTED:
                    self._leave_out(row)
                else:
                    self.account.bad(row)

    def _batches(self) -> Iterator[_Batch]:
        batch, characters = _Batch([], [], []), 0
        for row in self._checked(self._rows()):
            pieces = self.encoder.pieces(row.chat)
            self.tools_written |= row.chat.tools is not None
            self.chats_divided += not isinstance(pieces, RowFault) and len(pieces) > 1
            batch.rows.append(row)
            batch.pieces.append(pieces)
            if row.chat.rejected is not None:
                batch.rejected.append(self.encoder.pieces(row.chat, rejected=True))
            characters += 0 if isinstance(pieces, RowFault) else sum(len(p.text) for p in pieces)
            if len(batch.rows) >= ROWS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
                yield batch
                batch, characters = _Batch([], [], []), 0
        if batch.rows:
            yield batch

    def _checked(self, rows: Iterable[RawRow]) -> Iterator[RawRow]:
        """Rows with what is odd or personal in them noted, masked or left out."""
        for row in rows:
            for kind, text in oddities(row.chat, self._specials):
                self._note(row, kind, text, KEPT)
            personal = [found for text in texts_of(row.chat) for found in privacy.find(text)]
            if personal:
                chat = self._personal(row, personal)
                if chat is None:
                    continue
                row = RawRow(row.file, row.row, chat, row.group)
            yield row

    def _personal(self, row: RawRow, found: list[tuple[str, str]]) -> Chat | None:
        policy = self.dataset.personal_data
        action = {"report": KEPT, "mask": "masked", "drop": LEFT_OUT}[policy]
        for kind in dict.fromkeys(kind for kind, _ in found):
            shown = [text for one, text in found if one == kind]
            more = f", and {len(shown) - 1} more" if len(shown) > 1 else ""
            what = privacy.NAMES[kind]
            self._note(row, kind, f"has what looks like {what}: {shown[0]}{more}", action)
        if policy == "drop":
            self.rows_left_out += 1
            return None
        return privacy.mask_chat(row.chat) if policy == "mask" else row.chat

    def _problem(self, row: RawRow, kind: str, text: str, action: str = LEFT_OUT) -> Problem:
        return Problem(self.inputs[row.file].name, row.row, kind, text, action)

    def _note(self, row: RawRow, kind: str, text: str, action: str) -> None:
        self.account.note(self._problem(row, kind, text, action))

    def _leave_out(self, problem: Problem) -> None:
        self.rows_left_out += 1
        self.account.note(problem)

    def _finish(self, batch: _Batch) -> None:
        assert batch.encodings is not None
        found = [*batch.pieces, *batch.rejected]
        encoded = self.encoder.rows(found, batch.encodings.result())
        pairs = iter(encoded[len(batch.rows) :])
        records: list[Record] = []
        for row, chosen in zip(batch.rows, encoded[: len(batch.rows)], strict=True):
            rejected = next(pairs) if row.chat.rejected is not None else None
            try:
                fitting = self._fitting(row, chosen)
                records += self._records(row, fitting, self._rejected(row, rejected))
            except RowFault as fault:
                self._refuse(row, fault)
        self.writer.write(records)

    def _refuse(self, row: RawRow, fault: RowFault) -> None:
        problem = self._problem(row, fault.kind, fault.problem)
        if isinstance(fault, _LongFault):
            self.account.too_long(problem, fault.num_tokens)
        else:
            self.account.bad(problem)

    def _fitting(self, row: RawRow, found: Encoded) -> list[TokenRow]:
        """Rows of a chat that are not too long, by the recipe's policy.

        Raises:
            RowFault: There is none.
        """
        if isinstance(found, RowFault):
            raise found
        most, policy = self.dataset.max_length, self.dataset.too_long
        short = [one for one in found if isinstance(one, TokenRow) and len(one) <= most]
        if len(short) == len(found):
            return short
        if policy == "split" and row.chat.rejected is None:
            self.rows_divided += 1
            found = fit.divide(self.encoder, row.chat, most)
            self._note(row, fit.SPLIT, f"has more than {most} tokens, now in parts", "split")
        elif policy == "truncate":
            found = [self._cut(row, one) for one in found]
        long = [one for one in found if not isinstance(one, TokenRow) or len(one) > most]
        short = [one for one in found if isinstance(one, TokenRow) and len(one) <= most]
        if long and not short:
            raise _too_long(long[0], most)
        for one in long:
            self._refuse(row, _too_long(one, most))
        return short

    def _cut(self, row: RawRow, one: TokenRow | TooLong) -> TokenRow | TooLong:
        most = self.dataset.max_length
        if isinstance(one, TooLong) or len(one) <= most:
            return one
        start = fit.cut(one, most)
        if start is None:
            return one  # nothing would be trained: left out as too long
        self._note(row, fit.CUT, f"has {len(one)} tokens, cut to {most}", "cut")
        return start

    def _rejected(self, row: RawRow, found: Encoded | None) -> TokenRow | None:
        return None if found is None else self._fitting(row, found)[0]

    def _records(
        self, row: RawRow, found: Sequence[TokenRow], rejected: TokenRow | None
    ) -> list[Record]:
        found = [one for one in found if one.trained.any()]
        if not found:
            raise RowFault("nothing_to_train", "no token of it is to be trained")
        content, question = content_hash(row.chat), question_hash(row.chat)
        group = content if row.group is None else hash_text(row.group)
        group = question if self.dataset.group_by == "question" else group
        chat = self.num_chats
        self.num_chats += 1
        self.num_tokens += sum(map(len, found))
        if self.sketches is not None:
            self.sketches.add(" ".join(texts_of(row.chat)))
        return [
            Record(
                file=row.file,
                row=row.row,
                part=part,
                chat=chat,
                content=content,
                question=question,
                group=group,
                tokens=one,
                rejected=rejected,
                label=row.chat.label,
            )
            for part, one in enumerate(found)
        ]


class _LongFault(RowFault):
    """A row that is too long, with its length."""

    def __init__(self, problem: str, num_tokens: int) -> None:
        super().__init__(fit.LONG, problem)
        self.num_tokens = num_tokens


def _too_long(one: TokenRow | TooLong, most: int) -> _LongFault:
    if isinstance(one, TooLong):
        text = f"has at least {one.least_tokens} tokens, max_length is {most}"
        return _LongFault(text, one.least_tokens)
    return _LongFault(f"has {len(one)} tokens, max_length is {most}", len(one))
