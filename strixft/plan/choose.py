"""Lengths of the rows, and the choice of rows, recomputed layers and accumulation.

More recomputed layers take less memory and more time. So for each number of rows the search begins
at the fewest layers whose storages can fit at all, and goes from the fastest choice to slower ones
until one fits by the allocator's rules as well. Of all that are as fast as that but for
`AS_FAST`, the one that needs least memory is taken.
"""

from __future__ import annotations

import contextlib
import gc
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from strixft.catalog.hosts import Budget
from strixft.data.batches import (
    PackedRows,
    PackedShape,
    RowShape,
    largest_batch,
    rows_of_run,
    training_order,
)
from strixft.plan.dry_run import DryRun, Step
from strixft.plan.inductor import shared_kernels
from strixft.plan.measure import load_correction
from strixft.plan.scale import Traces
from strixft.probe.job import Job
from strixft.recipe.schema import Recipe

if TYPE_CHECKING:  # imports the data engine: a second, for a plan that may have no data
    from strixft.prepare.stage import Prepared

AS_FAST = 0.005
"""Share of the time of an update that is not worth memory: plans of one model are told apart no
better (docs/plan-accuracy.md)."""

MAX_TOKENS_PER_UPDATE = 65_536

UPDATES_AIMED_AT = 200


@dataclass(frozen=True, slots=True)
class DataShape:
    """Tokens and trained tokens of each training row; of each packed row, where rows are packed."""

    max_length: int
    """Longest row that the recipe allows; packed rows are filled up to it."""
    lengths: Sequence[int] = ()
    """Empty as long as the data are not prepared: every row is taken as `max_length` long."""
    trained: Sequence[int] = ()
    documents: Sequence[int] = ()
    """Documents of each packed row, its padding counted as one; empty where rows are not packed."""
    longest: int = 0
    """Tokens of the longest document or padding of a packed row."""

    @classmethod
    def of(cls, recipe: Recipe, prepared: Prepared | None, *, packed: bool) -> DataShape:
        """Return the shape of prepared data, or the worst that `max_length` allows.

        Args:
            recipe: The recipe, with the longest row that it allows.
            prepared: The data.
            packed: Several documents share a row.
        """
        most = recipe.dataset.max_length
        if prepared is None:
            return cls(most, longest=most if packed else 0)
        if packed:
            return cls.of_packed(most, prepared.packed_rows(recipe.dataset))
        rows = prepared.token_rows(recipe.dataset).train
        return cls(most, list(rows["length"]), list(rows["num_trained"]))

    @classmethod
    def of_packed(cls, most: int, rows: PackedRows) -> DataShape:
        """Return the shape of packed rows that are filled up to `most` tokens."""
        lengths, trained, documents = rows.sums("length"), rows.sums("num_trained"), rows.counts()
        rooms = most - lengths
        longest = max(int(rooms.max()), rows.longest())
        whole = documents + (rooms > 0)
        return cls(most, lengths.tolist(), trained.tolist(), whole.tolist(), longest)

    @property
    def is_packed(self) -> bool:
        """Several documents share a row."""
        return self.longest > 0

    def tokens_per_update(self, recipe: Recipe) -> int:
        """Return trained tokens of one update: the recipe's, or what makes about 200 updates."""
        asked = recipe.train.tokens_per_update
        if isinstance(asked, int):
            return asked
        if not self.lengths:
            return MAX_TOKENS_PER_UPDATE
        aim = round(sum(self.trained) * recipe.train.epochs / UPDATES_AIMED_AT)
        return min(max(aim, 1), MAX_TOKENS_PER_UPDATE)

    def rows_per_update(self, recipe: Recipe) -> int:
        """Return the rows of one update: as many as bring its trained tokens, at least one."""
        tokens = self.tokens_per_update(recipe)
        if not self.lengths:
            return max(1, tokens // self.max_length)
        mean = sum(self.trained) / len(self.trained)
        return max(1, min(len(self.trained), round(tokens / mean)))

    def steps(self, recipe: Recipe, rows: int) -> int:
        """Return the micro-batches of so many rows in an update."""
        return max(1, round(self.rows_per_update(recipe) / rows))

    def num_rows(self, recipe: Recipe, rows: int) -> int:
        """Return the rows that the whole run trains, in micro-batches of so many."""
        per_update = rows * self.steps(recipe, rows)
        return rows_of_run(len(self.lengths), recipe.train, per_update)

    def updates(self, recipe: Recipe, rows: int) -> int | None:
        """Return the updates of a run in micro-batches of so many rows; the last may be smaller.

        None before the data are prepared, unless the recipe names it.
        """
        if not self.lengths:
            return recipe.train.max_steps
        return -(-self.num_rows(recipe, rows) // (rows * self.steps(recipe, rows)))

    def mean_length(self) -> float:
        """Return the real tokens of a row, on average."""
        return sum(self.lengths) / len(self.lengths) if self.lengths else self.max_length

    def _packed_shape(self, order: Sequence[int], rows: int) -> PackedShape | None:
        if not self.is_packed:
            return None
        shape = PackedShape(self.max_length, 0, self.longest, rows)
        counts = np.array(self.documents or [1])[list(order)]
        documents = np.add.reduceat(counts, range(0, len(counts), rows))
        documents[-1] += (-len(counts) % rows) * len(shape.empty_row())
        return replace(shape, documents=int(documents.max()))

    def largest(self, recipe: Recipe, rows: int) -> RowShape:
        """Return the largest micro-batch of so many rows that the run will meet."""
        if not self.lengths:
            packed = self._packed_shape([0] * rows, rows)
            return RowShape(rows, self.max_length, rows * (self.max_length - 1), packed)
        sizes, seed = self.trained if self.is_packed else self.lengths, recipe.train.seed
        padded = not self.is_packed
        order = training_order(sizes, self.num_rows(recipe, rows), seed, rows, padded=padded)
        length, trained = largest_batch(self.lengths, self.trained, order, rows)
        packed = self._packed_shape(order, rows)
        return RowShape(rows, self.max_length if packed else length, trained, packed)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that can be chosen."""

    rows: int
    recomputed_layers: int
    steps: int
    need_bytes: int
    """Asked for, and outside the allocator; what the allocator holds beyond that comes on top."""
    seconds_per_update: float | None
    tok_per_s: float | None

    def order(self) -> tuple[float, ...]:
        """Sort the fastest first; without a time, the least recomputed and most rows first."""
        if self.seconds_per_update is None:
            return self.recomputed_layers, -self.rows
        return self.seconds_per_update, self.recomputed_layers, -self.rows


@dataclass(frozen=True, slots=True)
class Choice:
    """The plan, and what it was chosen from."""

    run: DryRun
    fits: bool
    frontier: list[Candidate] = field(default_factory=list)
    """For each number of rows the fewest recomputed layers that can fit; fastest first."""


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """Switch the garbage collector off: it would look at all objects that imports made.

    No trace lies in a cycle.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Planner:
    """Answers for one job, quickly once it has traced the like.

    Args:
        job: What to run, and where.
        data: Lengths of the rows.
    """

    def __init__(self, job: Job, data: DataShape) -> None:
        self.recipe, self.data = job.recipe, data
        self.outside_bytes = int(job.host.outside_bytes.value)
        self.num_layers = len(job.architecture.kinds)
        self.traces = Traces(job)
        self.correction = load_correction(job)
        self.step = cache(lambda rows, layers: self.step_of(self.data, rows, layers))
        self.candidate = cache(
            lambda rows, layers: self.candidate_of(self.step(rows, layers), self.data)
        )

    def rows(self) -> list[int]:
        """Return the rows to choose from, most first."""
        asked = self.recipe.train.micro_batch
        if isinstance(asked, int):
            return [asked]
        most = self.data.rows_per_update(self.recipe)
        return [2**n for n in range(most.bit_length() - 1, -1, -1)]

    def layers(self) -> list[int]:
        """Return the recomputed layers to choose from, fewest first."""
        asked, most = self.recipe.train.recompute, self.num_layers
        if asked == "auto":
            return list(range(most + 1))
        named = {"none": 0, "all": most}
        return [min(named.get(str(asked), asked if isinstance(asked, int) else 0), most)]

    def _layers_of(self, rows: int) -> list[int]:
        """Return the recomputed layers to choose from with so many rows, fewest first.

        None or all, where each number would be a trace of the whole model: layers share keys.
        """
        layers = self.layers()
        middle = layers[len(layers) // 2]
        quick = self.traces.stands(self.step(rows, middle))
        return layers if quick else sorted({layers[0], layers[-1]})

    def step_of(self, data: DataShape, rows: int, layers: int) -> Step:
        """Return the step of so many rows over some data."""
        return Step(data.largest(self.recipe, rows), layers, self.data.steps(self.recipe, rows))

    def dry_run(self, rows: int, layers: int) -> DryRun:
        """Return a choice's figures."""
        return self.dry_run_of(self.step(rows, layers))

    def dry_run_of(self, step: Step) -> DryRun:
        """Return a step's figures, corrected by what was measured here."""
        return self.correction.of_run(self.traces.dry_run(step))

    def need_bytes(self, run: DryRun) -> int:
        """Return what the budget is held against: reserved, and outside the allocator."""
        return run.reserved_bytes + self.outside_bytes

    def candidate_of(self, step: Step, data: DataShape) -> Candidate:
        """Return a step's figures without the allocator's rules, in milliseconds once traced."""
        found = self.traces.estimate(step)
        rows, steps = step.shape.rows, step.steps
        seconds = self.correction.time(found.seconds_per_update, steps)
        rate = rows * steps * data.mean_length() / seconds if seconds else None
        more = self.correction.bytes_more(found.asked_bytes)
        need = found.asked_bytes + more + self.outside_bytes
        return Candidate(rows, step.recomputed_layers, steps, need, seconds, rate)

    def fewest_recomputed(self, rows: int, limit: Budget) -> Candidate:
        """Return the fewest layers recomputed with which so many rows can fit; else the most."""

        def can_fit(layers: int) -> bool:
            return self.candidate(rows, layers).need_bytes <= limit.num_bytes

        few, *more = self._layers_of(rows)
        if can_fit(few) or not more:
            return self.candidate(rows, few)
        found = bisect_left(more, True, key=can_fit)  # layers that are all recomputed are the last
        return self.candidate(rows, more[min(found, len(more) - 1)])

    def most_recomputed(self, fewest: Candidate, seconds: float) -> Candidate | None:
        """Return the most layers recomputed, and not fewer, that take no longer; else None."""

        def time(layers: int) -> float:
            return self.candidate(fewest.rows, layers).seconds_per_update or 0.0

        if time(fewest.recomputed_layers) > seconds:
            return None
        layers = self._layers_of(fewest.rows)
        layers = layers[layers.index(fewest.recomputed_layers) :]
        return self.candidate(fewest.rows, layers[bisect_right(layers, seconds, key=time) - 1])

    def _smallest_as_fast(
        self, run: DryRun, frontier: Sequence[Candidate], limit: Budget
    ) -> DryRun:
        """Return what needs least of all that is as fast as a run, and fits; see `AS_FAST`."""
        if run.seconds_per_update is None:
            return run
        seconds = run.seconds_per_update * (1 + AS_FAST)
        found = (self.most_recomputed(fewest, seconds) for fewest in frontier)
        by_need = sorted((c for c in found if c), key=lambda candidate: candidate.need_bytes)
        return next(filter(None, (self._fits(candidate, limit) for candidate in by_need)), run)

    def _fits(self, candidate: Candidate, limit: Budget) -> DryRun | None:
        """Return the candidate's dry run, if the allocator's rules let it fit."""
        run = self.dry_run(candidate.rows, candidate.recomputed_layers)
        return run if self.need_bytes(run) <= limit.num_bytes else None

    @_collector_off()
    @shared_kernels()
    def choose(self, limit: Budget) -> Choice:
        """Return the plan, as this module's docstring says; the smallest one if none fits."""
        with self.traces.helped():
            return self._choose(limit)

    def _choose(self, limit: Budget) -> Choice:
        frontier = [self.fewest_recomputed(rows, limit) for rows in self.rows()]
        frontier.sort(key=Candidate.order)
        waiting = [c for c in frontier if c.need_bytes <= limit.num_bytes]
        while waiting:
            fastest = min(waiting, key=Candidate.order)
            run = self._fits(fastest, limit)
            if run is not None:
                return Choice(self._smallest_as_fast(run, frontier, limit), True, frontier)
            waiting.remove(fastest)
            if fastest.recomputed_layers < self.layers()[-1]:
                waiting.append(self.candidate(fastest.rows, fastest.recomputed_layers + 1))
        return Choice(self.dry_run(self.rows()[-1], self.layers()[-1]), False, frontier)


def choose(job: Job, limit: Budget, data: DataShape) -> Choice:
    """Return the fastest plan that fits, and of those as fast the smallest; see `Planner`."""
    return Planner(job, data).choose(limit)
