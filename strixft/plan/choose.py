"""Choose rows, recomputed layers and accumulation: the fastest plan that fits.

Memory and time of a step grow nearly evenly with its rows and with the layers that are recomputed.
So the corners of the choice are run dry, what lies between is drawn from them, and the plan that is
chosen is run dry itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from strixft.data import largest_batch, training_order
from strixft.hardware import Budget, Host
from strixft.plan.dry_run import DryRun, dry_run
from strixft.plan.trace import RowShape
from strixft.prepare import Prepared
from strixft.recipe import Recipe

MAX_TOKENS_PER_UPDATE = 65_536
UPDATES_AIMED_AT = 200


@dataclass(frozen=True, slots=True)
class DataShape:
    """What the plan needs to know of the data: tokens and trained tokens of each training row."""

    max_length: int
    """Longest row that the recipe allows."""
    lengths: Sequence[int] = ()
    """Empty as long as the data are not prepared: every row is taken as `max_length` long."""
    trained: Sequence[int] = ()

    @classmethod
    def of(cls, recipe: Recipe, prepared: Prepared | None) -> DataShape:
        """Of prepared data, or the worst that `max_length` allows."""
        if prepared is None:
            return cls(recipe.dataset.max_length)
        rows = prepared.token_rows(recipe.dataset).train
        return cls(recipe.dataset.max_length, list(rows["length"]), list(rows["num_trained"]))

    def tokens_per_update(self, recipe: Recipe) -> int:
        """Trained tokens of one update: the recipe's, or what makes about 200 updates."""
        asked = recipe.train.tokens_per_update
        if isinstance(asked, int):
            return asked
        if not self.lengths:
            return MAX_TOKENS_PER_UPDATE
        aim = round(sum(self.trained) * recipe.train.epochs / UPDATES_AIMED_AT)
        return min(max(aim, 1), MAX_TOKENS_PER_UPDATE)

    def rows_per_update(self, recipe: Recipe) -> int:
        """Rows of one update: as many as bring its trained tokens, and never none."""
        tokens = self.tokens_per_update(recipe)
        if not self.lengths:
            return max(1, tokens // self.max_length)
        mean = sum(self.trained) / len(self.trained)
        return max(1, min(len(self.trained), round(tokens / mean)))

    def mean_length(self) -> float:
        """Real tokens of a row, on average."""
        return sum(self.lengths) / len(self.lengths) if self.lengths else self.max_length

    def largest(self, recipe: Recipe, rows: int) -> RowShape:
        """The largest micro-batch of so many rows that the run will meet."""
        if not self.lengths:
            return RowShape(rows, self.max_length, rows * (self.max_length - 1))
        num_rows = max(rows, round(len(self.lengths) * recipe.train.epochs))
        order = training_order(self.lengths, num_rows, recipe.train.seed)
        return RowShape(rows, *largest_batch(self.lengths, self.trained, order, rows))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan whose figures are drawn between those of dry runs."""

    rows: int
    recomputed_layers: int
    steps: int
    need_bytes: float
    """Reserved, and outside the allocator."""
    seconds_per_update: float | None
    tok_per_s: float | None

    def order(self) -> tuple[float, ...]:
        """Fastest first; where the time is not known, least recomputed and most rows first."""
        if self.seconds_per_update is None:
            return self.recomputed_layers, -self.rows
        return self.seconds_per_update, self.recomputed_layers, -self.rows


@dataclass(frozen=True, slots=True)
class Choice:
    """The plan, and what it was chosen from."""

    run: DryRun
    fits: bool
    frontier: list[Candidate] = field(default_factory=list)


class Planner:
    """Answers for one recipe on one host; dry runs are kept.

    Args:
        recipe: What to run.
        config: The model's configuration.
        host: Where to run it.
        data: Lengths of the rows.
    """

    def __init__(self, recipe: Recipe, config: Any, host: Host, data: DataShape) -> None:
        self.recipe, self.data = recipe, data
        self._outside_bytes = int(host.outside_bytes.value)
        self.num_layers: int = config.get_text_config().num_hidden_layers
        self._per_update = data.rows_per_update(recipe)
        self.dry_run: Callable[[int, int], DryRun] = cache(
            lambda rows, layers: dry_run(
                recipe, config, host, data.largest(recipe, rows), layers, self.steps(rows)
            )
        )

    def steps(self, rows: int) -> int:
        """Micro-batches of an update."""
        return max(1, round(self._per_update / rows))

    def rows(self) -> list[int]:
        """Rows to choose from, most first."""
        asked = self.recipe.train.micro_batch
        if isinstance(asked, int):
            return [asked]
        return [2**n for n in range(self._per_update.bit_length() - 1, -1, -1)]

    def layers(self) -> list[int]:
        """Recomputed layers to choose from, fewest first."""
        asked, most = self.recipe.train.recompute, self.num_layers
        if asked == "auto":
            return list(range(most + 1))
        named = {"none": 0, "all": most}
        return [min(named.get(str(asked), asked if isinstance(asked, int) else 0), most)]

    def need_bytes(self, run: DryRun) -> int:
        """What the budget is held against: reserved, and outside the allocator."""
        return run.reserved_bytes + self._outside_bytes

    def _corners(self) -> tuple[list[int], list[int]]:
        """Rows and layers that are run dry; two of each where there are two."""
        rows, layers = self.rows(), self.layers()
        few = rows[-1]
        more = min((count for count in rows if count > few), default=few)
        return [few, more], [layers[0], layers[-1]]

    def _draw(self, rows: int, layers: int, value: Callable[[DryRun], float]) -> float:
        """A figure between those of the corners."""
        (r0, r1), (k0, k1) = self._corners()
        t = 0.0 if k1 == k0 else (layers - k0) / (k1 - k0)

        def between(count: int) -> float:
            return (1 - t) * value(self.dry_run(count, k0)) + t * value(self.dry_run(count, k1))

        low = between(r0)
        return low if r1 == r0 else low + (between(r1) - low) * (rows - r0) / (r1 - r0)

    def candidate(self, rows: int, layers: int) -> Candidate:
        """What a choice is expected to need."""
        steps = self.steps(rows)
        need = self._draw(rows, layers, self.need_bytes)
        if self.dry_run(self._corners()[0][0], self.layers()[0]).seconds_per_update is None:
            return Candidate(rows, layers, steps, need, None, None)
        step = self._draw(rows, layers, lambda run: (run.seconds_per_update or 0) / run.steps)
        tokens = rows * steps * self.data.mean_length()
        return Candidate(rows, layers, steps, need, step * steps, tokens / (step * steps))

    def frontier(self, limit: Budget) -> list[Candidate]:
        """For each number of rows, the fewest layers recomputed that fit, and none at all."""
        found = []
        for rows in self.rows():
            all_layers = [self.candidate(rows, layers) for layers in self.layers()]
            fitting = [c for c in all_layers if c.need_bytes <= limit.num_bytes]
            found += fitting[:1] or all_layers[-1:]
        return sorted(found, key=Candidate.order)

    def choose(self, limit: Budget) -> Choice:
        """The fastest plan that fits, run dry itself; the smallest one if none does."""
        frontier = self.frontier(limit)
        for candidate in frontier:
            for layers in self._from(candidate.recomputed_layers):
                run = self.dry_run(candidate.rows, layers)
                if self.need_bytes(run) <= limit.num_bytes:
                    return Choice(run, True, frontier)
                if candidate.need_bytes > limit.num_bytes:
                    break
        return Choice(self.dry_run(self.rows()[-1], self.layers()[-1]), False, frontier)

    def _from(self, layers: int) -> Iterator[int]:
        """These recomputed layers, then a few more at a time, should the drawn figure be short."""
        more = [choice for choice in self.layers() if choice >= layers]
        yield from more[:: max(1, math.ceil(self.num_layers / 20))]


def choose(recipe: Recipe, config: Any, host: Host, limit: Budget, data: DataShape) -> Choice:
    """The fastest plan that fits; see `Planner`."""
    return Planner(recipe, config, host, data).choose(limit)
