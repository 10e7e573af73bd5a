"""Rows stream from files through a `Maker` to disk, in this process or in several.

Little data are made here. More go to child processes, which are forked once the first rows are
done, so that they know the tokenizer and its words already. Batches come back in their order:
the result is the same on any number of processors.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from strixft.data import checks, too_long
from strixft.data.checks import any_of, oddities, texts_of
from strixft.data.duplicates import Sketches, content_hash, hash_text, question_hash, sketch
from strixft.data.encode import Encoded, Encoder, TokenRow, TooLong
from strixft.data.load import Input, Problem, group_of, read_row
from strixft.data.mask import Piece
from strixft.data.readers import RawRow
from strixft.data.row_report import KEPT, LEFT_OUT, RowReport
from strixft.data.rows import Record, RowWriter, batch_of
from strixft.formats.faults import RowFault
from strixft.formats.messages import Chat, Row
from strixft.formats.sources import SourceFile
from strixft.formats.table import NOT_WANTED
from strixft.recipe.schema import Dataset
from strixft.support.errors import HostError
from strixft.support.signals import follow_parent

ROWS_AT_ONCE = 512

BYTES_AT_ONCE = 4_000_000
"""A batch ends here, so that a few huge rows do not meet in memory."""

BATCHES_HERE = 4
"""Batches that are made before other processes are worth their start."""

MOST_PROCESSES = 8

AHEAD = 2
"""Batches that wait for each process."""


Job = tuple[int, list[RawRow]]

_maker: Maker | None = None
"""What a child process makes rows with; it has it from its parent, by the fork."""


def _make(job: Job) -> Made:
    assert _maker is not None
    return _maker.make(*job)


def _alone() -> None:
    """In a child: the tokenizer's own threads did not come along."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    follow_parent()


def num_processes() -> int:
    """Processes that are worth starting: one for each processor this one may use."""
    return min(len(os.sched_getaffinity(0)), MOST_PROCESSES)


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
        account: RowReport,
        writer: RowWriter,
    ) -> None:
        self.inputs, self.encoder, self.account, self.writer = inputs, encoder, account, writer
        self.sketches = Sketches() if dataset.near_duplicates != "ignore" else None
        self.total = Made()
        """Sums over all batches."""
        self._rows_seen = self._bytes_seen = 0
        sources = [one.source for one in inputs]
        known = all(isinstance(source, SourceFile) and source.is_plain for source in sources)
        self._bytes = sum(
            s.path.stat().st_size for s in sources if isinstance(s, SourceFile) and known
        )
        self._maker = Maker(dataset, inputs, encoder)

    def rows_expected(self) -> int | None:
        """Rows in all, judged by the bytes read so far; None where files are packed."""
        if not self._bytes or not self._bytes_seen:
            return None
        share = min(1.0, self._bytes_seen / self._bytes)
        return max(self._rows_seen, round(self._rows_seen / share))

    def run(self) -> Iterator[int]:
        """Do the work; yields the number of rows read after each batch.

        Raises:
            HostError: A child process ended.
        """
        jobs = self._jobs()
        for job in islice(jobs, BATCHES_HERE):
            yield self._take(self._maker.make(*job))
        following = list(islice(jobs, 1))
        if not following:
            return
        if num_processes() < 2:
            for job in (*following, *jobs):
                yield self._take(self._maker.make(*job))
            return
        try:
            yield from self._run_in_children(following[0], jobs)
        except BrokenProcessPool:
            raise HostError(
                f"a process that prepared data ended after row {self.account.rows_read},"
                " nearly always for memory",
                fix="close other programs, and type it again",
            ) from None

    def _run_in_children(self, first: Job, jobs: Iterator[Job]) -> Iterator[int]:
        global _maker
        _maker = self._maker
        gc.freeze()  # a collection in a child would copy all that it only looks at
        waiting: deque[Future[Made]] = deque()
        context = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(num_processes(), mp_context=context, initializer=_alone)
        try:
            waiting.append(pool.submit(_make, first))
            for job in jobs:
                waiting.append(pool.submit(_make, job))
                if len(waiting) > AHEAD * num_processes():
                    yield self._take(waiting.popleft().result())
            while waiting:
                yield self._take(waiting.popleft().result())
        finally:
            pool.shutdown(cancel_futures=True)
            _maker = None
            gc.unfreeze()

    def _jobs(self) -> Iterator[Job]:
        """Rows in batches, each of one input."""
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

    def _take(self, made: Made) -> int:
        """Put a batch into the account and on disk."""
        for weight, problem, tokens in made.problems:
            self.account.take(weight, problem, tokens)
        if made.batch is not None:
            self.writer.write(made.batch)
        if self.sketches is not None:
            self.sketches.add(made.sketches)
        total = self.total
        for name in ("num_rows", "num_tokens", "rows_divided", "chats_divided"):
            setattr(total, name, getattr(total, name) + getattr(made, name))
        total.unused += made.unused
        total.tools_as_text |= made.tools_as_text
        total.checked = total.checked[0] + made.checked[0], total.checked[1] + made.checked[1]
        self.account.rows_read += made.num_rows
        return self.account.rows_read


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
        super().__init__(too_long.LONG, problem)
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
        found = [one for text in texts_of(chat) for one in checks.find(text)]
        if not found:
            return chat
        policy = self._dataset.personal_data
        action = {"report": KEPT, "mask": "masked", "drop": LEFT_OUT}[policy]
        for count, kind in enumerate(dict.fromkeys(kind for kind, _ in found)):
            shown = [text for one, text in found if one == kind]
            more = f", and {len(shown) - 1} more" if len(shown) > 1 else ""
            text = f"has what looks like {checks.NAMES[kind]}: {shown[0]}{more}"
            weight: Weight = "left_out" if policy == "drop" and not count else "note"
            self._note(row, kind, text, action, weight)
        if policy == "drop":
            return None
        return checks.mask_chat(chat) if policy == "mask" else chat

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
        parts = too_long.divide(self._encoder, item.chat, most)
        if len(parts) > len(found):
            self.made.rows_divided += 1
            text = f"has more than {most} tokens, now {len(parts)} rows"
            self._note(item.row, too_long.SPLIT, text, "split")
        return parts

    def _cut(self, item: _Item, one: TokenRow | TooLong) -> TokenRow | TooLong:
        most = self._dataset.max_length
        if isinstance(one, TooLong) and item.chat.text is not None:
            one = too_long.start_of_text(self._encoder, item.chat.text) or one
        if isinstance(one, TooLong) or len(one) <= most:
            return one
        start = too_long.cut(one, most)
        if start is None:
            return one  # nothing would be trained: left out as too long
        self._note(item.row, too_long.CUT, f"has {len(one)} tokens, cut to {most}", "cut")
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
