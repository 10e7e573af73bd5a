"""A trace's sizes at another number of rows, tokens or trained tokens.

A trace is made with sides that are multiples of primes which divide no side of the model. Which of
them divide a size, and how often, then says how it grows: with B, with B × T, with B × T², with the
trained tokens, with a chunk of the head. Events and their order are the same within a `Regime`.

Shapes: B rows, T tokens, K trained tokens, n rows of a chunk of the head, m rows of its last chunk,
L tokens of the longest document.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from torch.utils._pytree import tree_iter

from strixft.data.batches import PackedShape
from strixft.model.architecture import architecture_of, sample_layers
from strixft.plan import trace_cache
from strixft.plan.cost import SEEN, Floats, Rates, Seconds, Work
from strixft.plan.dry_run import DryRun, Step, dry_run, layer_kinds, run_schedule, trace_run
from strixft.plan.full_depth import Ints, Kind, Schedule, rounded_all, stands_for
from strixft.plan.op_cache import Memo
from strixft.plan.trace import Place, RowShape, Trace, one_step
from strixft.probe.job import Job
from strixft.step.loss import CHUNK_ELEMENTS, chunk_rows

TILE = 32
"""Some attention operators pad T to a multiple of this (aten/src/ATen/native/transformers)."""

OUTSIDE = Place(0, "load")
"""Where weights outside the layers are born, such as a vision tower, whose sides are many: frozen,
they grow with nothing, whatever divides their sizes."""

LARGEST = 10_000
"""Where the search for a traced length ends."""


@dataclass(frozen=True, slots=True)
class Dims:
    """The sides of a micro-batch that sizes grow with."""

    rows: int
    length: int
    trained: int
    chunk: int
    last_chunk: int
    longest: int = 1
    """Of the documents that share a row; 1 where each has a row of its own."""

    @classmethod
    def of(cls, shape: RowShape, vocabulary: int) -> Dims:
        """Of a micro-batch."""
        chunk = chunk_rows(shape.trained, vocabulary)
        rest = shape.trained - chunk * (math.ceil(shape.trained / chunk) - 1)
        longest = shape.packed.longest if shape.packed else 1
        return cls(shape.rows, shape.length, shape.trained, chunk, rest, longest)

    @property
    def chunks(self) -> int:
        """Chunks of the head."""
        return math.ceil(self.trained / self.chunk)


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

    @classmethod
    def of(cls, config: Any, shape: RowShape) -> Regime:
        """The regime of a micro-batch."""
        sides = Dims.of(shape, config.get_text_config().vocab_size)
        windows = architecture_of(config).windows
        beyond = tuple(shape.length >= window for window in windows)
        chunks = min(sides.chunks, 3)
        packed = shape.packed is not None
        return cls(shape.rows == 1 and not packed, beyond, chunks, packed)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _primes(first: int = 29) -> Iterator[int]:
    return filter(_is_prime, range(first, LARGEST))


def _largest_prime_factor(number: int) -> int:
    return max((d for d in range(2, number + 1) if number % d == 0 and _is_prime(d)), default=1)


@dataclass(frozen=True, slots=True)
class Sample:
    """The micro-batch that is traced for a regime."""

    sides: Dims
    primes: tuple[int, ...]
    """One that divides each of the sides and none of the others; 1 where a side does not vary."""

    @property
    def shape(self) -> RowShape:
        """The micro-batch; documents of a row change no size that matters."""
        rows, length, trained = self.sides.rows, self.sides.length, self.sides.trained
        is_packed, longest = self.sides.longest > 1, self.sides.longest
        packed = PackedShape(length, rows, longest) if is_packed else None
        return RowShape(rows, length, trained, packed)


def _lengths(windows: Iterable[int], beyond: Iterable[bool]) -> Iterator[tuple[int, int]]:
    """Lengths on the right side of each window, with their prime."""
    sides = list(zip(windows, beyond, strict=True))
    tiled = ((TILE * prime, prime) for prime in _primes())
    plain = ((number, number) for number in range(LARGEST // TILE, 2, -1) if _is_prime(number))
    for length, prime in chain(tiled, plain):
        if all((length >= window) == is_beyond for window, is_beyond in sides):
            yield length, prime


def _told_apart(numbers: Sequence[int], primes: Sequence[int], taken: int) -> bool:
    """Whether each prime divides its own number alone, and no side that is taken."""
    divides = [[number % prime == 0 for prime in primes] for number in numbers]
    own = [[i == j for j in range(len(primes))] for i in range(len(numbers))]
    return divides == own and min(primes) > 7 and math.gcd(taken, math.prod(primes)) == 1


def _trained(
    regime: Regime, vocabulary: int, taken: int, others: int
) -> Iterator[tuple[Dims, tuple[int, ...]]]:
    """Trained tokens in as many chunks as the regime says, with primes of K, n and m.

    Args:
        regime: What the micro-batch should be an instance of.
        vocabulary: Logits of a token.
        taken: A product of sides that their primes should not divide.
        others: A product of the primes of the other sides, which should divide none of them.
    """
    most = max(1, CHUNK_ELEMENTS // vocabulary)
    for trained in range(regime.chunks * most, (regime.chunks - 1) * most, -1):
        sides = Dims.of(RowShape(1, 1, trained), vocabulary)
        numbers = [trained, sides.chunk, sides.last_chunk][: 1 if regime.chunks == 1 else 3]
        primes = list(map(_largest_prime_factor, numbers))
        if _told_apart(numbers, primes, taken) and math.gcd(others, math.prod(numbers)) == 1:
            yield sides, (*primes, 1, 1)[:3]


def sample(config: Any, regime: Regime, taken: int) -> Sample | None:
    """A micro-batch of a regime whose sides are told apart by their primes; None if there is none.

    Args:
        config: The model's configuration.
        regime: What the micro-batch should be an instance of.
        taken: A product of the model's own sides, which share no prime with the micro-batch's.
    """
    rows = 1 if regime.one_row else next(p for p in _primes(11) if taken % p)
    taken *= rows
    longest_prime = next(p for p in _primes() if taken % p) if regime.packed else 1
    longest = SEEN * longest_prime if regime.packed else 1
    taken *= longest_prime
    vocabulary = config.get_text_config().vocab_size
    for length, prime in _lengths(architecture_of(config).windows, regime.beyond):
        if taken % prime:
            others = rows * prime * longest_prime
            for sides, primes in _trained(regime, vocabulary, taken * prime, others):
                found = replace(sides, rows=rows, length=length, longest=longest)
                return Sample(found, (rows, prime, *primes, longest_prime))
    return None


class _Growth:
    """How numbers grow with the sides of the micro-batch.

    Args:
        numbers: As they were traced.
        traced: The micro-batch of the trace.
        fixed: Which of them do not grow.
    """

    def __init__(self, numbers: Ints, traced: Sample, fixed: Sequence[bool] = ()) -> None:
        self.powers = np.stack([_powers(numbers, prime) for prime in traced.primes], axis=1)
        self.powers[np.flatnonzero(fixed)] = 0
        self._unit = numbers / self._product(traced.sides)

    def _product(self, sides: Dims) -> Floats:
        logs = np.log(np.array(astuple(sides), dtype=np.float64))
        product: Floats = np.exp(self.powers @ logs)
        return product

    def at(self, sides: Dims) -> Floats:
        """The numbers for other sides."""
        return np.rint(self._unit * self._product(sides))


def _powers(numbers: Ints, prime: int) -> Ints:
    """How often a prime divides each number."""
    powers, rest = np.zeros_like(numbers), numbers.copy()
    while prime > 1 and (divides := (rest != 0) & (rest % prime == 0)).any():
        powers += divides
        rest = np.where(divides, rest // prime, rest)
    return powers


class ScaledTrace:
    """A trace, and what its numbers are for other micro-batches of its regime.

    Args:
        trace: Of the sample.
        traced: The sample.
    """

    def __init__(self, trace: Trace, traced: Sample) -> None:
        costs = [cost for _, cost in trace.work]
        self.trace = trace
        self._chunks = traced.sides.chunks
        frozen = [s.part == "weights" and s.born == OUTSIDE for s in trace.storages]
        self._sizes = _Growth(np.array([s.num_bytes for s in trace.storages]), traced, frozen)
        self._flop = _Growth(np.array([cost.flop for cost in costs]), traced)
        self._moved = _Growth(np.array([part for cost in costs for part in cost.moved]), traced)
        self._owner = np.repeat(np.arange(len(costs)), [len(cost.moved) for cost in costs])
        self._dtypes = [cost.dtype for cost in costs]

    def keeps_weights(self) -> bool:
        """Whether no weight seems to grow with the micro-batch: its sides would share a prime."""
        loaded = [s.born.phase == "load" for s in self.trace.storages]
        return not self._sizes.powers[loaded].any()

    def sizes(self, sides: Dims) -> Ints:
        """Bytes of each storage, rounded to the allocator's block."""
        return rounded_all(self._sizes.at(sides).astype(np.int64))

    def work(self, sides: Dims) -> Work:
        """What each operator computes and moves."""
        each = self._moved.at(sides)
        moved: Floats = np.bincount(self._owner, each, len(self._dtypes)).astype(np.float64)
        return Work(self._flop.at(sides), moved, self._dtypes)

    def repeats(self, sides: Dims) -> Floats:
        """How often each operator runs for each time it was traced: chunks in the middle do."""
        of_chunk = 3
        moved = np.bincount(self._owner, self._moved.powers[:, of_chunk], len(self._dtypes))
        in_chunk = (moved > 0) | (self._flop.powers[:, of_chunk] > 0)
        more = (sides.chunks - 1) / (self._chunks - 1) if self._chunks > 1 else 1.0
        return np.where(in_chunk, more, 1.0)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a step asks for, without the allocator's rules."""

    asked_bytes: int
    """At the peak, with BLAS's workspace; blocks and segments of the allocator take more."""
    seconds_per_update: float | None


@dataclass(frozen=True, slots=True)
class _Scaled:
    """A step's schedule with the sizes and times of its micro-batch."""

    schedule: Schedule
    sizes: Ints
    seconds: Seconds | None


class Traces:
    """Answers for one job.

    Args:
        job: What is trained, and where.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._config, self._host = job, job.config, job.host
        self._memo = Memo()
        self._scaled: dict[Any, ScaledTrace | None] = {}
        self._schedules: dict[Any, Schedule] = {}
        self._numbers: dict[Any, tuple[Ints, Seconds | None]] = {}

    def _sides(self) -> list[int]:
        """The model's own sides."""
        sides = [side for side in tree_iter(self._config.to_dict()) if type(side) is int]
        return [*{side for side in sides if side > 1}, self._job.recipe.lora.r]

    def _trace(self, step: Step, regime: Regime, shape: RowShape, kinds: list[Kind]) -> Trace:
        """A trace of a micro-batch, from disk where it was made before."""
        about = regime, shape
        name = trace_cache.name_of(self._job, about, kinds)
        found = trace_cache.load(name)
        if found is None:
            layers = step.recomputed_layers
            found = trace_run(self._job, shape, layers, 2, self._memo).trace
            trace_cache.save(name, found)
        return found

    def _make(self, step: Step, regime: Regime, kinds: list[Kind]) -> ScaledTrace | None:
        """A trace whose primes divide no side of the model, where there are such."""
        traced = sample(self._config, regime, math.prod(self._sides()))
        if traced is None:
            return None
        scaled = ScaledTrace(self._trace(step, regime, traced.shape, kinds), traced)
        return scaled if scaled.keeps_weights() else None

    def _scaled_trace(self, step: Step) -> tuple[Any, ScaledTrace | None]:
        """The trace that answers for a step, and what tells it from others."""
        kinds = layer_kinds(self._config, step.recomputed_layers)
        regime = Regime.of(self._config, step.shape)
        sampled = [kinds[layer] for layer in sample_layers(kinds)]
        key = regime, tuple(sampled)
        if key not in self._scaled:
            self._scaled[key] = self._make(step, regime, sampled)
        return key, self._scaled[key]

    def _schedule(self, key: Any, scaled: ScaledTrace, step: Step) -> Schedule:
        key = *key, step.recomputed_layers, step.steps > 1
        if key not in self._schedules:
            kinds = layer_kinds(self._config, step.recomputed_layers)
            deep = None if len(sample_layers(kinds)) >= len(kinds) else stands_for(kinds)
            trace = scaled.trace if step.steps > 1 else one_step(scaled.trace)
            self._schedules[key] = Schedule(trace, deep)
        return self._schedules[key]

    def _find(self, step: Step) -> _Scaled | None:
        key, scaled = self._scaled_trace(step)
        if scaled is None:
            return None
        sides = Dims.of(step.shape, self._config.get_text_config().vocab_size)
        if (*key, sides) not in self._numbers:
            seconds = scaled.work(sides).seconds(Rates.of(self._host), scaled.repeats(sides))
            self._numbers[*key, sides] = scaled.sizes(sides), seconds
        return _Scaled(self._schedule(key, scaled, step), *self._numbers[*key, sides])

    def estimate(self, step: Step) -> Estimate:
        """What a step asks for: milliseconds once its like was traced."""
        found = self._find(step)
        if found is None:
            run = self.dry_run(step)
            return Estimate(run.peak_bytes, run.seconds_per_update)
        schedule, seconds = found.schedule, found.seconds
        time = schedule.seconds_per_update(found.sizes, seconds, step.steps)
        asked = int(schedule.live_bytes(found.sizes).max())
        return Estimate(asked + int(self._host.workspace_bytes.value), time)

    def dry_run(self, step: Step) -> DryRun:
        """A step's figures: those of a fresh trace, from one that was scaled."""
        found = self._find(step)
        if found is None:
            return self.fresh(step)
        return run_schedule(found.schedule, found.sizes, found.seconds, self._host, step)

    def fresh(self, step: Step) -> DryRun:
        """A step's figures from a trace of its own."""
        return dry_run(self._job, step.shape, step.recomputed_layers, step.steps, self._memo)
