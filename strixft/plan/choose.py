"""Choose rows, recomputed layers and accumulation: a fast plan that fits.

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
from dataclasses import dataclass, field
from functools import cache

from strixft.catalog.hosts import Budget
from strixft.plan.data_shape import DataShape
from strixft.plan.dry_run import DryRun, Step
from strixft.plan.inductor import shared_kernels
from strixft.plan.measure import load_correction
from strixft.plan.scale import Traces
from strixft.probe.job import Job

AS_FAST = 0.005
"""Share of the time of an update that is not worth memory: plans of one model are told apart no
better (docs/plan-accuracy.md)."""


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
        self.step = cache(self._step)
        self.candidate = cache(self._candidate)

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

    def _step(self, rows: int, layers: int) -> Step:
        return self.step_of(self.data, rows, layers)

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

    def _candidate(self, rows: int, layers: int) -> Candidate:
        return self.candidate_of(self.step(rows, layers), self.data)

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

        few, *more = self.layers()
        if can_fit(few) or not more or not can_fit(more[-1]):
            return self.candidate(rows, few if can_fit(few) or not more else more[-1])
        return self.candidate(rows, more[bisect_left(more, True, key=can_fit)])

    def most_recomputed(self, fewest: Candidate, seconds: float) -> Candidate | None:
        """Return the most layers recomputed, and not fewer, that take no longer; else None."""

        def time(layers: int) -> float:
            return self.candidate(fewest.rows, layers).seconds_per_update or 0.0

        if time(fewest.recomputed_layers) > seconds:
            return None
        layers = self.layers()[self.layers().index(fewest.recomputed_layers) :]
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
