"""Rows stream from files through a `Maker` to disk, in this process or in several.

Little data are made here. More go to child processes, which are forked once the first rows are
done, so that they know the tokenizer and its words already. Batches come back in their order:
the result is the same on any number of processors.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from strixft.data import Encoder, Input, RowWriter
from strixft.data.account import Account
from strixft.data.duplicates import Sketches
from strixft.data.readers import RawRow
from strixft.errors import HostError
from strixft.prepare.make import Made, Maker
from strixft.recipe import Dataset
from strixft.sources import SourceFile
from strixft.stopping import follow_parent

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
        account: Account,
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
