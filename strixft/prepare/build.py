"""Build token rows: raw rows stream through a `BatchMaker` to disk, in one process or several.

The first batches are made in this process. If more follow, child processes make them; they are
forked after the first batches, so that they know the tokenizer and its words already. Batches come
back in their order: the result is the same on any number of processors.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import psutil
import pyarrow as pa

from strixft.data import checks
from strixft.data.duplicates import content_hash, hash_text, question_hash, sketch
from strixft.data.encode import SCHEMA, Encoded, Encoder, TokenRow, TooLong, batch_of
from strixft.data.load import Input, read_row, value_at
from strixft.data.row_report import KEPT, LEFT_OUT, MadeBatch, Problem, RowReport, Weight
from strixft.data.streams import RawRow
from strixft.data.template import has_reasoning, without_reasoning
from strixft.data.too_long import shorten
from strixft.formats.faults import RowFault
from strixft.formats.known_formats import NOT_WANTED
from strixft.formats.messages import Chat, DataRow
from strixft.formats.sources import SourceFile
from strixft.recipe.schema import Dataset
from strixft.support.errors import HostError
from strixft.support.progress import progress_bar
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

RawBatch = tuple[int, list[RawRow]]
"""Index of the input, and rows of it."""

_maker: BatchMaker | None = None
"""The maker of a child process, which the fork brought along."""


class BatchMaker:
    """Maker of token rows from raw rows, one batch at a time."""

    def __init__(
        self,
        dataset: Dataset,
        inputs: Sequence[Input],
        encoder: Encoder,
        thinking: Literal["train", "keep", "drop"] = "train",
    ) -> None:
        self.dataset, self.inputs, self.encoder = dataset, inputs, encoder
        self.thinking = thinking
        encoder.mask_checked = encoder.mask_equal = 0
        tokenizer = encoder.tokenizer
        added = (str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
        self._specials = checks.any_of([*tokenizer.all_special_tokens, *added])

    def make(self, file: int, raws: Sequence[RawRow]) -> MadeBatch:
        """Make the token rows of a batch."""
        self._file, self._input, self._made = file, self.inputs[file], MadeBatch()
        checked, equal = self.encoder.mask_checked, self.encoder.mask_equal
        chats: list[tuple[int, Chat, str | None]] = []  # number, chat and group of each row
        for number, raw, _ in raws:
            try:
                chats += self._read(number, raw)
            except RowFault as fault:
                self._refuse(number, fault)
        pairs = [
            replace(chat, messages=chat.rejected)
            for _, chat, _ in chats
            if chat.rejected is not None
        ]
        encoded = self.encoder.encode([*(chat for _, chat, _ in chats), *pairs])
        rejected = iter(encoded[len(chats) :])
        rows: list[TokenRow] = []
        for (number, chat, group), found in zip(chats, encoded, strict=False):
            try:
                other = next(rejected) if chat.rejected is not None else None
                rows += self._rows(number, chat, group, found, other)
            except RowFault as fault:
                self._refuse(number, fault)
        self._made.records = batch_of(rows) if rows else None
        self._made.counts += Counter(
            rows_read=len(raws),
            bytes_read=sum(raw.size for raw in raws),
            token_rows=len(rows),
            mask_checked=self.encoder.mask_checked - checked,
            mask_equal=self.encoder.mask_equal - equal,
        )
        return self._made

    def _note(
        self,
        row: int,
        found: Iterable[tuple[str, str]],
        action: str = KEPT,
        weight: Weight = "note",
        key: str | None = None,
        tokens: int = 0,
    ) -> None:
        """Note the first text of each kind, and the number of others."""
        by_kind: dict[str, list[str]] = {}
        for kind, text in found:
            by_kind.setdefault(kind, []).append(text)
        for kind, (text, *others) in by_kind.items():
            text += f", and {len(others)} more" if others else ""
            problem = Problem(self._input.name, row, kind, text, action, key, weight, tokens)
            self._made.problems.append(problem)
            weight = "note"  # a row counts once, however many kinds it has

    def _refuse(self, row: int, fault: RowFault) -> None:
        weight: Weight = "left_out" if fault.kind == NOT_WANTED else "bad"
        tokens = 0
        if isinstance(fault, TooLong):
            weight, tokens = "too_long", fault.num_tokens
        found = [(fault.kind, fault.problem)]
        self._note(row, found, LEFT_OUT, weight, fault.key, tokens)

    def _read(self, number: int, raw: DataRow | RowFault) -> list[tuple[int, Chat, str | None]]:
        """Format and check one row; return nothing if it is left out for its personal data.

        Raises:
            RowFault: It cannot be used.
        """
        chat, column = read_row(self._input, raw), self.dataset.group_by
        if chat.text is None:
            thinks = has_reasoning(chat)
            self._made.counts["rows_thinking"] += thinks
            self._made.counts["rows_chats"] += 1
            chat = without_reasoning(chat) if thinks and self.thinking == "drop" else chat
        assert not isinstance(raw, RowFault)
        group = None if column in (None, QUESTION) else value_at(raw, column)
        if group is None and column not in (None, QUESTION):
            raise RowFault("no_group", f"has no {column!r}, which dataset.group_by names")
        self._made.unused.update(chat.unused - {column})
        self._note(number, checks.oddities(chat, self._specials))
        policy = self.dataset.personal_data
        action = {"report": KEPT, "mask": "masked", "drop": LEFT_OUT}[policy]
        found = [
            (kind, f"has what looks like {checks.NAMES[kind]}: {part}")
            for text in checks.texts_of(chat)
            for kind, part in checks.find(text)
        ]
        self._note(number, found, action, "left_out" if policy == "drop" else "note")
        if found and policy == "drop":
            return []
        chat = checks.mask_chat(chat) if found and policy == "mask" else chat
        return [(number, chat, None if group is None else str(group))]

    def _short(self, number: int, chat: Chat, found: Encoded | RowFault) -> list[TokenRow]:
        """Return the rows of a chat that are not too long, by the recipe's policy.

        Raises:
            RowFault: There are none.
        """
        if isinstance(found, RowFault):
            raise found

        def note(kind: str, text: str, action: str) -> None:
            self._note(number, [(kind, text)], action)

        rows = shorten(self.encoder, chat, found, self.dataset.too_long, note)
        fitting = [one for one in rows if isinstance(one, TokenRow)]
        faults = [one for one in rows if isinstance(one, TooLong)]
        if faults and not fitting:
            raise faults[0]
        for fault in faults:
            self._refuse(number, fault)
        return fitting

    def _rows(
        self,
        number: int,
        chat: Chat,
        group: str | None,
        found: Encoded | RowFault,
        rejected: Encoded | RowFault | None,
    ) -> list[TokenRow]:
        """Return the token rows of a chat, each with the place that it comes from.

        Raises:
            RowFault: There are none.
        """
        counts = self._made.counts
        if not isinstance(found, RowFault):
            counts["chats_divided"] += len(found) > 1
            self._check_shown(number, chat)
        pair = None if rejected is None else self._short(number, chat, rejected)[0]
        rows = [one for one in self._short(number, chat, found) if one.trained.any()]
        if not rows:
            raise RowFault("nothing_to_train", "no token of it is to be trained")
        content, question = content_hash(chat), question_hash(chat)
        shared = content if group is None else hash_text(group)
        shared = question if self.dataset.group_by == QUESTION else shared
        for part, one in enumerate(rows):
            one.file, one.row, one.part, one.label = self._file, number, part, chat.label
            one.content, one.question, one.group = content, question, shared
            if pair is not None:
                one.rejected_input_ids, one.rejected_trained = pair.input_ids, pair.trained
        counts["tokens"] += sum(map(len, rows))
        if self.dataset.near_duplicates != "ignore":
            self._made.sketches += sketch(" ".join(checks.texts_of(chat)))
        return rows

    def _check_shown(self, number: int, chat: Chat) -> None:
        """Note speakers' names that the template hides, and tools that it has no place for."""
        if chat.text is not None:
            return
        template = self.encoder.masker_of(chat).template
        self._made.counts["tools_as_text"] += template.writes_as_text(chat)
        names = {m["name"]: None for m in chat.messages if "name" in m and m["role"] != "tool"}
        text = "".join(piece.text for piece in self.encoder.pieces(chat)) if names else ""
        hidden = [name for name in names if name not in text]
        if hidden:
            told = f"names who speaks, {hidden[0]!r}, which the chat template does not show"
            self._note(number, [("name_hidden", told)])


def _make(raw: RawBatch) -> MadeBatch:
    assert _maker is not None
    return _maker.make(*raw)


def _begin_child() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork leaves the tokenizer's threads behind
    follow_parent()


def num_processes() -> int:
    """Return how many processes are worth starting: one for each processor available."""
    return min(len(os.sched_getaffinity(0)), MOST_PROCESSES)


def _raw_batches(inputs: Sequence[Input]) -> Iterator[RawBatch]:
    for file, one in enumerate(inputs):
        raws, size = list[RawRow](), 0
        for raw in one.raw_rows():
            raws.append(raw)
            size += raw.size
            if len(raws) >= ROWS_AT_ONCE or size >= BYTES_AT_ONCE:
                yield file, raws
                raws, size = [], 0
        if raws:
            yield file, raws


def _made_batches(maker: BatchMaker, raws: Iterator[RawBatch]) -> Generator[MadeBatch, None, None]:
    global _maker
    for raw in islice(raws, BATCHES_HERE):
        yield maker.make(*raw)
    following = list(islice(raws, 1))
    if not following or num_processes() < 2:
        for raw in chain(following, raws):
            yield maker.make(*raw)
        return
    _maker = maker
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


def build_rows(maker: BatchMaker, report: RowReport, path: Path) -> float:
    """Make the token rows of all inputs and write them to a file, with a progress bar.

    Returns:
        The seconds it took.

    Raises:
        HostError: A child process ended.
    """
    sources = [one.source for one in maker.inputs]
    plain = [one for one in sources if isinstance(one, SourceFile) and one.is_plain]
    size = sum(one.path.stat().st_size for one in plain)
    began = told = time.monotonic()
    process, counts = psutil.Process(), report.counts
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, SCHEMA) as writer,
        progress_bar(unit=" rows", desc="prepare", mininterval=0.5) as bar,
        closing(_made_batches(maker, _raw_batches(maker.inputs))) as batches,  # ends the children
    ):
        try:
            for made in batches:
                report.take(made)
                if made.records is not None:
                    writer.write_batch(made.records)
                now, done = time.monotonic(), counts["rows_read"]
                if len(plain) == len(sources) and counts["bytes_read"]:  # else nobody knows
                    bar.total = round(done * max(1.0, size / counts["bytes_read"]))
                bar.update(done - bar.n)
                if now - told > 1:
                    told, rate = now, round(counts["tokens"] / (now - began))
                    bar.note(tok_per_s=rate, resident_bytes=process.memory_info().rss)
        except BrokenProcessPool:
            raise HostError(
                f"a process that prepared data ended after row {counts['rows_read']},"
                " nearly always for memory",
                fix="close other programs, and run the command again",
            ) from None
        bar.total = counts["rows_read"]
        bar.refresh()
    return time.monotonic() - began
