"""Plans beside the one that was chosen: is it the fastest on this device too?"""

from __future__ import annotations

from collections.abc import Iterator

from strixft.hardware import Budget
from strixft.plan import Choice, DryRun, Planner

Plan = tuple[int, int]
"""Rows of a micro-batch, recomputed layers."""


def _fewest_that_fit(planner: Planner, rows: int, limit: Budget) -> Plan:
    """By the allocator's rules too; the most layers, if none fit."""
    few = planner.fewest_recomputed(rows, limit).recomputed_layers
    more = [layers for layers in planner.layers() if layers >= few]
    fitting = (n for n in more if planner.need_bytes(planner.dry_run(rows, n)) <= limit.num_bytes)
    return rows, next(fitting, more[-1])


def _near(planner: Planner, chosen: Plan, limit: Budget) -> Iterator[Plan]:
    """Other numbers of rows with the fewest layers; the same rows with more and fewer layers."""
    rows, layers = chosen
    yield from (_fewest_that_fit(planner, n, limit) for n in planner.rows() if n != rows)
    for step in (max(1, planner.num_layers * share // 80) for share in (1, 3, 10)):
        yield from ((rows, n) for n in (layers + step, layers - step) if n in planner.layers())


def neighbours(planner: Planner, choice: Choice, limit: Budget, count: int) -> list[DryRun]:
    """So many plans that fit, of those near the choice the ones predicted to be fastest.

    Args:
        planner: What made the choice.
        choice: The plan to look around.
        limit: What they may use.
        count: How many; fewer come where fewer fit.
    """
    chosen = choice.run.shape.rows, choice.run.recomputed_layers
    plans = set(_near(planner, chosen, limit) if count else ()) - {chosen}
    runs = (planner.dry_run(*plan) for plan in plans)
    fitting = [run for run in runs if planner.need_bytes(run) <= limit.num_bytes]
    return sorted(fitting, key=_seconds_per_row)[:count]


def _seconds_per_row(run: DryRun) -> float:
    return (run.seconds_per_update or 0.0) / (run.steps * run.shape.rows)
