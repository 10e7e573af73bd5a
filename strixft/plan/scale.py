"""Sizes and costs of a step at any number of rows, tokens and trained tokens, from two traces.

Two micro-batches of a `Regime` have the same events in the same order, so their traces are compared
number by number: what a size has grown by says what it is proportional to. Every dimension of the
two micro-batches differs by another factor, so no two products of dimensions are mistaken.

Letters: B rows, T tokens of a row, K trained tokens, n trained tokens of a chunk of the head, m
those of its last chunk, L tokens of the longest document.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from strixft.data.batches import PackedShape, RowShape
from strixft.model.architecture import architecture_of, sample_layers
from strixft.plan import trace_cache
from strixft.plan.cost import SEEN, Costs, Floats, Rates, Seconds
from strixft.plan.dry_run import (
    DryRun,
    Ints,
    Kind,
    Schedule,
    Step,
    dry_run,
    layer_kinds,
    rounded_all,
    run_schedule,
    stands_for,
    trace_run,
)
from strixft.plan.helper import Helper
from strixft.plan.trace import Trace, one_step
from strixft.probe.job import Job
from strixft.step.loss import CHUNK_ELEMENTS, chunk_rows

TILE = 32
"""Some attention operators pad T to a multiple of this (aten/src/ATen/native/transformers)."""

SAMPLED_ROWS = (8, 24)
"""B of the two traces."""

SAMPLED_LENGTH = 1024
"""T of the smaller trace, where no window asks for another one. B × T is of a real micro-batch's
size: the compiler keeps what is smaller, weights or activations."""

TOKENS, CHUNK, TRAINED = 1, 2, 4
"""Indices of `Dims.terms`: B × T, n, and K."""


@dataclass(frozen=True, slots=True)
class Dims:
    """Dimensions of a micro-batch that sizes and costs grow with."""

    rows: int
    length: int
    trained: int
    chunk: int
    last_chunk: int
    longest: int = 1
    """L; 1 where each document has a row of its own."""

    @classmethod
    def of(cls, shape: RowShape, vocabulary: int) -> Dims:
        """Return the dimensions of a micro-batch."""
        chunk = chunk_rows(shape.trained, vocabulary)
        rest = shape.trained - chunk * (math.ceil(shape.trained / chunk) - 1)
        longest = shape.packed.longest if shape.packed else 1
        return cls(shape.rows, shape.length, shape.trained, chunk, rest, longest)

    @property
    def chunks(self) -> int:
        """Chunks of the head."""
        return math.ceil(self.trained / self.chunk)

    def terms(self) -> Floats:
        """Return every product of dimensions that a size, FLOP or bytes moved can grow with."""
        rows, length, tokens = self.rows, self.length, self.rows * self.length
        head = (self.chunk, self.last_chunk, self.trained)
        attention = (tokens * length, tokens * self.longest, length * length)  # scores, mask
        return np.array([1, tokens, *head, *attention, rows, length], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Regime:
    """Micro-batches whose steps have the same events."""

    one_row: bool
    """A single row needs no copies to become contiguous; nor do documents laid end to end."""
    beyond: tuple[bool, ...]
    """For each sliding window: rows are as long or longer, so there is a mask."""
    chunks: int
    """1, 2, or 3 for any more: those in the middle are alike."""
    packed: bool
    """Documents share rows."""
    length: int | None = None
    """T, where layers carry a state along the row: they go through it chunk by chunk."""

    @classmethod
    def of(cls, config: Any, shape: RowShape) -> Regime:
        """Return the regime of a micro-batch."""
        chunks = Dims.of(shape, config.get_text_config().vocab_size).chunks
        architecture, packed = architecture_of(config), shape.packed is not None
        return cls(
            one_row=shape.rows == 1 and not packed,
            beyond=tuple(shape.length >= window for window in architecture.windows),
            chunks=min(chunks, 3),
            packed=packed,
            length=shape.length if architecture.recurs else None,
        )

    def samples(self, config: Any) -> tuple[RowShape, RowShape]:
        """Return two micro-batches of this regime, all of whose dimensions grow differently."""
        vocabulary = config.get_text_config().vocab_size
        known, beyond = architecture_of(config), self.beyond
        windows, table = known.windows, known.positions
        if table is not None and table < SAMPLED_LENGTH + TILE:  # no row is longer
            windows, beyond = (*windows, table + 1), (*beyond, False)
        lengths = (self.length,) * 2 if self.length else _two_lengths(windows, beyond)
        most = max(1, CHUNK_ELEMENTS // vocabulary)  # trained tokens of a chunk
        least = max((self.chunks - 1) * most, most // 2)
        # one token more than full chunks: then n, m and K do not grow by the same factor
        trained = (
            next(k for k in count(least + 1) if k % self.chunks == 1 % self.chunks),
            self.chunks * most,
        )
        rows = (1, 1) if self.one_row else SAMPLED_ROWS
        packed: tuple[PackedShape | None, ...] = (None, None)
        if self.packed:  # L is a multiple of SEEN: its share of the FLOP is not rounded
            packed = tuple(
                PackedShape(length, b, SEEN * longest)
                for length, b, longest in zip(lengths, rows, (3, 5), strict=True)
            )
        small, large = map(RowShape, rows, lengths, trained, packed)
        return small, large


def _two_lengths(windows: Sequence[int], beyond: Sequence[bool]) -> tuple[int, int]:
    """Return two lengths on the right side of each window, multiples of `TILE` if possible."""
    sides = list(zip(windows, beyond, strict=True))
    least = max((window for window, is_beyond in sides if is_beyond), default=1)
    below = min((window for window, is_beyond in sides if not is_beyond), default=None)
    if below is None:
        first = -(-max(least, SAMPLED_LENGTH) // TILE) * TILE
        return first, first + TILE
    last = (below - 1) // TILE * TILE
    if last - TILE >= least:
        return last - TILE, last
    return max(least, below - 2), below - 1


class _Growth:
    """Numbers as functions of the dimensions.

    Args:
        small: Numbers of the smaller trace, (N,).
        large: The same numbers in the larger trace, (N,).
        dims: Dimensions of both.
    """

    def __init__(self, small: Ints, large: Ints, dims: tuple[Dims, Dims]) -> None:
        before, after = (each.terms() for each in dims)
        ratio = np.where(small == large, 1.0, large / np.maximum(small, 1))
        is_like = np.isclose(ratio[:, None], after / before, rtol=1e-9, atol=0)  # (numbers, terms)
        is_product = is_like.any(1)
        # a sum, such as of documents and one, becomes a line over the tokens, or the trained ones
        over = TOKENS if after[TOKENS] > before[TOKENS] else TRAINED
        self.term = np.where(is_product, is_like.argmax(1), over)
        line = (large - small) / (after[over] - before[over])
        self._slope = np.where(is_product, small / before[self.term], line)
        self._offset = np.where(is_product, 0, small - line * before[over])

    def at(self, dims: Dims) -> Floats:
        """Return the numbers for other dimensions, (N,)."""
        return np.rint(self._offset + self._slope * dims.terms()[self.term])


class ScaledTrace:
    """A trace, and its numbers for other micro-batches of its regime.

    Args:
        small: Trace of the smaller micro-batch.
        large: Trace of the larger one, with the same events.
        dims: Dimensions of both.
    """

    def __init__(self, small: Trace, large: Trace, dims: tuple[Dims, Dims]) -> None:
        def growth(numbers: Callable[[Trace], list[int]]) -> _Growth:
            before, after = (np.array(numbers(t), dtype=np.int64) for t in (small, large))
            return _Growth(before, after, dims)

        costs = [cost for _, cost in small.work]
        self.trace = small
        self._chunks = dims[0].chunks
        self._sizes = growth(lambda trace: [s.num_bytes for s in trace.storages])
        self._flop = growth(lambda trace: [cost.flop for _, cost in trace.work])
        self._moved = growth(lambda trace: [part for _, cost in trace.work for part in cost.moved])
        self._owner = np.repeat(np.arange(len(costs)), [len(cost.moved) for cost in costs])
        self._dtypes = [cost.dtype for cost in costs]

    def sizes(self, dims: Dims) -> Ints:
        """Return the bytes of each storage, (S,), rounded to the allocator's block."""
        return rounded_all(self._sizes.at(dims).astype(np.int64))

    def seconds(self, dims: Dims, rates: Rates | None) -> Seconds | None:
        """Return the predicted time of each operator; None where the host's rates are not known."""
        moved = np.bincount(self._owner, self._moved.at(dims), len(self._dtypes))
        costs = Costs(self._flop.at(dims), moved.astype(np.float64), self._dtypes)
        return costs.seconds(rates, self._repeats(dims))

    def _repeats(self, dims: Dims) -> Floats:
        """Return how often each operator runs for each time it was traced.

        Chunks in the middle of the head run more often than in a trace of three.
        """
        moved = np.bincount(self._owner, self._moved.term == CHUNK, len(self._dtypes))
        in_chunk = (moved > 0) | (self._flop.term == CHUNK)
        more = (dims.chunks - 1) / (self._chunks - 1) if self._chunks > 1 else 1.0
        return np.where(in_chunk, more, 1.0)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory of a step without the allocator's rules, and its time."""

    asked_bytes: int
    """At the peak, with BLAS's workspace; blocks and segments of the allocator take more."""
    seconds_per_update: float | None


class Traces:
    """Answers for one job.

    Args:
        job: What is trained, and where.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._vocabulary = job.config.get_text_config().vocab_size
        self._scaled: dict[Any, ScaledTrace | None] = {}
        self._schedules: dict[Any, Schedule] = {}
        self._numbers: dict[Any, tuple[Ints, Seconds | None]] = {}
        self._helper: Helper | None = None

    @contextlib.contextmanager
    def helped(self) -> Iterator[None]:
        """Let a second process make half of the traces that this block asks for."""
        with Helper(self._trace) as self._helper:
            try:
                yield
            finally:
                self._helper = None

    def _name(self, shape: RowShape, kinds: Sequence[Kind]) -> str:
        return trace_cache.name_of(self._job, shape, kinds)

    def _trace(self, shape: RowShape, recomputed_layers: int, kinds: Sequence[Kind]) -> Trace:
        """Return the trace of a micro-batch, from disk where it was made before."""
        return trace_cache.trace(
            self._name(shape, kinds),
            lambda: trace_run(self._job, shape, recomputed_layers, 2).trace,
        )

    def _scale(self, regime: Regime, layers: int, kinds: Sequence[Kind]) -> ScaledTrace | None:
        """Return what answers for a regime; None where its two traces are not alike."""
        samples = regime.samples(self._job.config)
        small, large = self._two_traces(samples, layers, kinds)
        first, second = (Dims.of(shape, self._vocabulary) for shape in samples)
        return ScaledTrace(small, large, (first, second)) if small.is_like(large) else None

    def _two_traces(
        self, samples: tuple[RowShape, RowShape], layers: int, kinds: Sequence[Kind]
    ) -> tuple[Trace, Trace]:
        small, large = samples
        by_helper: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self._helper is not None and not trace_cache.is_kept(self._name(large, kinds)):
            by_helper = self._helper.beside(large, layers, kinds)
        with by_helper:
            first = self._trace(small, layers, kinds)
        return first, self._trace(large, layers, kinds)

    def _key(self, step: Step) -> tuple[Regime, tuple[Kind, ...]]:
        kinds = layer_kinds(self._job, step.recomputed_layers)
        sampled = tuple(kinds[layer] for layer in sample_layers(kinds))
        return Regime.of(self._job.config, step.shape), sampled

    def is_traced(self, step: Step) -> bool:
        """Return whether the like of a step was traced, so that an answer takes milliseconds."""
        return self._key(step) in self._scaled

    def stands(self, step: Step) -> bool:
        """Return whether few traced layers stand for all, so that an answer is quick."""
        return self._find(step) is not None

    def _find(self, step: Step) -> tuple[Schedule, Ints, Seconds | None] | None:
        """Return a step's events, with the sizes and times of its micro-batch."""
        kinds = layer_kinds(self._job, step.recomputed_layers)
        key = regime, sampled = self._key(step)
        if key not in self._scaled:
            self._scaled[key] = self._scale(regime, step.recomputed_layers, key[1])
        scaled = self._scaled[key]
        if scaled is None:
            return None
        deep = *key, step.recomputed_layers, step.steps > 1
        if deep not in self._schedules:
            trace = scaled.trace if step.steps > 1 else one_step(scaled.trace)
            all_traced = len(sampled) >= len(kinds)
            self._schedules[deep] = Schedule(trace, None if all_traced else stands_for(kinds))
        if not self._schedules[deep].fits_together:
            return None
        dims = Dims.of(step.shape, self._vocabulary)
        if (*key, dims) not in self._numbers:
            seconds = scaled.seconds(dims, Rates.of(self._job.host))
            self._numbers[*key, dims] = scaled.sizes(dims), seconds
        return self._schedules[deep], *self._numbers[*key, dims]

    def estimate(self, step: Step) -> Estimate:
        """Return what a step asks for, in milliseconds once its regime was traced."""
        found = self._find(step)
        if found is None:
            run = self.fresh(step)
            return Estimate(run.peak_bytes - run.unsplit_bytes, run.seconds_per_update)
        schedule, sizes, seconds = found
        asked = int(schedule.live_bytes(sizes).max()) + int(self._job.host.workspace_bytes.value)
        return Estimate(asked, schedule.seconds_per_update(sizes, seconds, step.steps))

    def dry_run(self, step: Step) -> DryRun:
        """Return a step's figures: those of a trace of its own, from two that were made."""
        found = self._find(step)
        return self.fresh(step) if found is None else run_schedule(*found, self._job.host, step)

    def fresh(self, step: Step) -> DryRun:
        """Return a step's figures from a trace of its own."""
        return dry_run(self._job, step.shape, step.recomputed_layers, step.steps)
