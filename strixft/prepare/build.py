"""Build token rows: raw rows stream through a `BatchMaker` to disk, in one process or several.

The first batches are made in this process. If more follow, child processes make them; they are
forked after the first batches, so that they know the tokenizer and its words already. Batches come
back in their order: the result is the same on any number of processors.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, Literal

from strixft.data import checks, too_long
from strixft.data.checks import any_of, oddities, texts_of
from strixft.data.duplicates import content_hash, hash_text, question_hash, sketch
from strixft.data.encode import Encoded, Encoder, TokenRow, TooLong
from strixft.data.load import Input, Problem, group_of, read_row
from strixft.data.mask import Piece
from strixft.data.row_report import KEPT, LEFT_OUT, RowReport
from strixft.data.rows import RowWriter, batch_of
from strixft.data.streams import RawRow
from strixft.formats.faults import RowFault
from strixft.formats.messages import Chat, DataRow
from strixft.formats.sources import SourceFile
from strixft.formats.table import NOT_WANTED
from strixft.recipe.schema import Dataset
from strixft.support.errors import HostError
from strixft.support.signals import follow_parent

ROWS_AT_ONCE = 512

BYTES_AT_ONCE = 4_000_000
"""A batch ends here, so that memory never holds many huge rows."""

BATCHES_HERE = 4
"""Batches before other processes are worth their start."""

MOST_PROCESSES = 8

AHEAD = 2
"""Batches that wait for each process."""

QUESTION = "question"
"""Value of `group_by` that keeps rows with the same question together."""

Weight = Literal["note", "bad", "too_long", "left_out"]
"""Count that a problem goes to; `note`: the row is used."""

RawBatch = tuple[int, list[RawRow]]
"""Index of the input, and rows of it."""

_maker: BatchMaker | None = None
"""The maker of a child process, which the fork brought along."""


@dataclass(slots=True)
class MadeBatch:
    """The token rows of a batch of raw rows, and the facts to report of them."""

    num_rows: int
    records: Any = None
    """Token rows, a `pyarrow.RecordBatch`; None if there are none."""
    problems: list[tuple[Weight, Problem, int]] = field(default_factory=list)
    """In the order of the rows; with each the tokens of a row that is too long."""
    counts: Counter[str] = field(default_factory=Counter)
    """`tokens`; `chats_divided` by templates that rewrite answers; `tools_as_text`: chats with
    functions or calls for which the template has no place; `mask_checked` rows whose mask was
    decoded, and `mask_equal` rows of them that were right."""
    unused: Counter[str] = field(default_factory=Counter)
    """Column, or key of messages, that is not read → rows that have it."""
    sketches: bytearray = field(default_factory=bytearray)


@dataclass(slots=True)
class _RenderedChat:
    """A chat that waits for its batch to be tokenised."""

    row: int
    chat: Chat
    group: str | None
    pieces: list[Piece] | RowFault
    rejected: list[Piece] | RowFault | None


class BatchMaker:
    """Maker of token rows from raw rows, one batch at a time.

    Args:
        dataset: The recipe's section.
        inputs: Sources of the rows.
        encoder: Turns chats into tokens.
    """

    def __init__(self, dataset: Dataset, inputs: Sequence[Input], encoder: Encoder) -> None:
        self.dataset, self.inputs, self.encoder = dataset, inputs, encoder
        tokenizer = encoder.tokenizer
        added = (str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
        self._specials = any_of([*tokenizer.all_special_tokens, *added])

    def make(self, file: int, raws: Sequence[RawRow]) -> MadeBatch:
        """Make the token rows of a batch.

        Args:
            file: Index of the input that the rows come from.
            raws: Rows as they stand there.
        """
        self._file, self._input, self._made = file, self.inputs[file], MadeBatch(len(raws))
        checked, equal = self.encoder.mask_checked, self.encoder.mask_equal
        rendered: list[_RenderedChat] = []
        for number, raw, _ in raws:
            try:
                if (one := self._render(number, raw)) is not None:
                    rendered.append(one)
            except RowFault as fault:
                self._refuse(number, fault)
        records = self._tokenise(rendered)
        self._made.records = batch_of(records) if records else None
        self._made.counts["mask_checked"] = self.encoder.mask_checked - checked
        self._made.counts["mask_equal"] = self.encoder.mask_equal - equal
        return self._made

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
        self._made.problems.append((weight, problem, tokens))

    def _note_kinds(
        self, row: int, found: Iterable[tuple[str, str]], action: str, weight: Weight = "note"
    ) -> None:
        """Note the first text of each kind, and the number of others."""
        by_kind: dict[str, list[str]] = {}
        for kind, text in found:
            by_kind.setdefault(kind, []).append(text)
        for kind, texts in by_kind.items():
            more = f", and {len(texts) - 1} more" if len(texts) > 1 else ""
            self._note(row, kind, texts[0] + more, action, weight)
            weight = "note"  # a row counts once, however many kinds it has

    def _refuse(self, row: int, fault: RowFault) -> None:
        weight: Weight = "left_out" if fault.kind == NOT_WANTED else "bad"
        tokens = 0
        if isinstance(fault, TooLong):
            weight, tokens = "too_long", fault.num_tokens
        self._note(row, fault.kind, fault.problem, LEFT_OUT, weight, tokens, fault.key)

    def _render(self, number: int, raw: DataRow | RowFault) -> _RenderedChat | None:
        """Format, check and render one row; None if it is left out for its personal data.

        Raises:
            RowFault: It cannot be used.
        """
        read = read_row(self._input, raw)
        assert not isinstance(raw, RowFault)
        column = self.dataset.group_by
        group = None if column in (None, QUESTION) else group_of(raw, str(column))
        self._made.unused.update(read.unused - {column})
        self._note_kinds(number, oddities(read, self._specials), KEPT)
        chat = self._without_personal_data(number, read)
        if chat is None:
            return None
        pieces = self.encoder.pieces(chat)
        paired = chat.rejected is not None
        rejected = self.encoder.pieces(chat, rejected=True) if paired else None
        self._note_hidden_name(number, chat, pieces)
        counts = self._made.counts
        counts["tools_as_text"] += self.encoder.writes_as_text(chat)
        counts["chats_divided"] += not isinstance(pieces, RowFault) and len(pieces) > 1
        return _RenderedChat(number, chat, group, pieces, rejected)

    def _without_personal_data(self, row: int, chat: Chat) -> Chat | None:
        """Return the chat as the recipe's policy leaves it; None if the policy drops it."""
        policy = self.dataset.personal_data
        action = {"report": KEPT, "mask": "masked", "drop": LEFT_OUT}[policy]
        found = [
            (kind, f"has what looks like {checks.NAMES[kind]}: {part}")
            for text in texts_of(chat)
            for kind, part in checks.find(text)
        ]
        self._note_kinds(row, found, action, "left_out" if policy == "drop" else "note")
        if not found or policy == "report":
            return chat
        return checks.mask_chat(chat) if policy == "mask" else None

    def _note_hidden_name(self, row: int, chat: Chat, pieces: list[Piece] | RowFault) -> None:
        """Note a speaker's name that the chat template does not show; few templates do."""
        names = {m["name"]: None for m in chat.messages if "name" in m and m["role"] != "tool"}
        text = "" if isinstance(pieces, RowFault) else "".join(piece.text for piece in pieces)
        hidden = [name for name in names if text and name not in text]
        if hidden:
            told = f"names who speaks, {hidden[0]!r}, which the chat template does not show"
            self._note(row, "name_hidden", told, KEPT)

    def _tokenise(self, rendered: Sequence[_RenderedChat]) -> list[TokenRow]:
        """Tokenise all chats of the batch in one go."""
        pieces = [one.pieces for one in rendered]
        pieces += [one.rejected for one in rendered if one.rejected is not None]
        encoded = self.encoder.rows(pieces)
        pairs = iter(encoded[len(rendered) :])
        records: list[TokenRow] = []
        for one, found in zip(rendered, encoded[: len(rendered)], strict=True):
            rejected = next(pairs) if one.rejected is not None else None
            try:
                pair = None if rejected is None else self._fitting(one, rejected)[0]
                records += self._records(one, self._fitting(one, found), pair)
            except RowFault as fault:
                self._refuse(one.row, fault)
        return records

    def _fits(self, one: TokenRow | TooLong) -> bool:
        return isinstance(one, TokenRow) and len(one) <= self.dataset.max_length

    def _fitting(self, of: _RenderedChat, found: Encoded) -> list[TokenRow]:
        """Return the rows of a chat that are not too long, by the recipe's policy.

        Raises:
            RowFault: There are none.
        """
        if isinstance(found, RowFault):
            raise found
        most, policy = self.dataset.max_length, self.dataset.too_long
        if not all(map(self._fits, found)):
            if policy == "truncate":
                found = [self._cut(of, one) for one in found]
            elif policy == "split" and of.chat.rejected is None:
                found = self._split(of, found)
        fitting = [one for one in found if isinstance(one, TokenRow) and self._fits(one)]
        faults = [
            TooLong(len(one), most) if isinstance(one, TokenRow) else one
            for one in found
            if not self._fits(one)
        ]
        if faults and not fitting:
            raise faults[0]
        for fault in faults:
            self._refuse(of.row, fault)
        return fitting

    def _cut(self, of: _RenderedChat, one: TokenRow | TooLong) -> TokenRow | TooLong:
        most = self.dataset.max_length
        if isinstance(one, TooLong) and of.chat.text is not None:
            one = next(too_long.stretches(self.encoder, of.chat.text), one)
        if isinstance(one, TooLong) or len(one) <= most:
            return one
        start = too_long.cut(one, most)
        if start is None:
            return one  # it would have no token to train: left out as too long
        self._note(of.row, "cut", f"has {len(one)} tokens, cut to {most}", "cut")
        return start

    def _split(
        self, of: _RenderedChat, found: list[TokenRow | TooLong]
    ) -> list[TokenRow | TooLong]:
        most = self.dataset.max_length
        parts = too_long.divide(self.encoder, of.chat, most)
        if len(parts) > len(found):
            text = f"has more than {most} tokens, now {len(parts)} rows"
            self._note(of.row, "split", text, "split")
        return parts

    def _records(
        self, of: _RenderedChat, found: Sequence[TokenRow], rejected: TokenRow | None
    ) -> list[TokenRow]:
        found = [one for one in found if one.trained.any()]
        if not found:
            raise RowFault("nothing_to_train", "no token of it is to be trained")
        content, question = content_hash(of.chat), question_hash(of.chat)
        group = content if of.group is None else hash_text(of.group)
        group = question if self.dataset.group_by == QUESTION else group
        self._made.counts["tokens"] += sum(map(len, found))
        if self.dataset.near_duplicates != "ignore":
            self._made.sketches += sketch(" ".join(texts_of(of.chat)))
        return [
            replace(
                one,
                file=self._file,
                row=of.row,
                part=part,
                content=content,
                question=question,
                group=group,
                rejected=rejected,
                label=of.chat.label,
            )
            for part, one in enumerate(found)
        ]


def _make(raw: RawBatch) -> MadeBatch:
    assert _maker is not None
    return _maker.make(*raw)


def _begin_child() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork leaves the tokenizer's threads behind
    follow_parent()


def num_processes() -> int:
    """Return how many processes are worth starting: one for each processor available."""
    return min(len(os.sched_getaffinity(0)), MOST_PROCESSES)


class Build:
    """One pass over the rows of a recipe.

    Args:
        dataset: The recipe's section.
        inputs: Sources to read.
        encoder: Turns chats into tokens.
        report: Gets every problem.
        writer: Gets every token row.
    """

    def __init__(
        self,
        dataset: Dataset,
        inputs: Sequence[Input],
        encoder: Encoder,
        report: RowReport,
        writer: RowWriter,
    ) -> None:
        self.inputs, self.encoder, self.report, self.writer = inputs, encoder, report, writer
        self.sketches = bytearray()
        """MinHash sketches of all chats, if near duplicates are asked for."""
        self.counts, self.unused = Counter[str](), Counter[str]()
        """Sums over all batches, as in `MadeBatch`."""
        self._rows_seen = self._bytes_seen = 0
        files = [one.source for one in inputs if isinstance(one.source, SourceFile)]
        known = len(files) == len(inputs) and all(file.is_plain for file in files)
        self._bytes = sum(file.path.stat().st_size for file in files) if known else 0
        self._maker = BatchMaker(dataset, inputs, encoder)

    def rows_expected(self) -> int | None:
        """Estimate the number of rows from the bytes read so far; None for compressed files."""
        if not self._bytes or not self._bytes_seen:
            return None
        share = min(1.0, self._bytes_seen / self._bytes)
        return max(self._rows_seen, round(self._rows_seen / share))

    def run(self) -> Iterator[int]:
        """Make all rows; yield the number of rows read after each batch.

        Raises:
            HostError: A child process ended.
        """
        try:
            with closing(self._made_batches()) as batches:  # ends the children, whatever happens
                for made in batches:
                    yield self._take(made)
        except BrokenProcessPool:
            raise HostError(
                f"a process that prepared data ended after row {self.report.rows_read},"
                " nearly always for memory",
                fix="close other programs, and run the command again",
            ) from None

    def _made_batches(self) -> Generator[MadeBatch, None, None]:
        global _maker
        raws = self._raw_batches()
        for raw in islice(raws, BATCHES_HERE):
            yield self._maker.make(*raw)
        following = list(islice(raws, 1))
        if not following or num_processes() < 2:
            for raw in chain(following, raws):
                yield self._maker.make(*raw)
            return
        _maker = self._maker
        gc.freeze()  # a collection in a child would copy pages that it only reads
        waiting: deque[Future[MadeBatch]] = deque()
        context = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(num_processes(), mp_context=context, initializer=_begin_child)
        try:
            for raw in chain(following, raws):
                waiting.append(pool.submit(_make, raw))
                if len(waiting) > AHEAD * num_processes():
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            _maker = None
            gc.unfreeze()

    def _raw_batches(self) -> Iterator[RawBatch]:
        """Yield rows in batches, each of one input."""
        for file, one in enumerate(self.inputs):
            raws: list[RawRow] = []
            size = 0
            for raw in one.raw_rows():
                raws.append(raw)
                size += raw[2]
                self._rows_seen += 1
                self._bytes_seen += raw[2]
                if len(raws) >= ROWS_AT_ONCE or size >= BYTES_AT_ONCE:
                    yield file, raws
                    raws, size = [], 0
            if raws:
                yield file, raws

    def _take(self, made: MadeBatch) -> int:
        """Put a batch into the report and on disk."""
        for weight, problem, tokens in made.problems:
            self.report.take(weight, problem, tokens)
        if made.records is not None:
            self.writer.write(made.records)
        self.sketches += made.sketches
        self.counts.update(made.counts)
        self.unused.update(made.unused)
        self.report.rows_read += made.num_rows
        return self.report.rows_read
