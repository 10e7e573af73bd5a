"""Traces that are made once and answer for any micro-batch and any number of recomputed layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch.utils._pytree import tree_iter

from strixft.architecture import sample_layers
from strixft.hardware import Host
from strixft.plan import stored
from strixft.plan.cost import Rates, Seconds
from strixft.plan.dry_run import (
    DryRun,
    Step,
    dry_run,
    layer_kinds,
    run_schedule,
    trace_run,
)
from strixft.plan.memo import Memo
from strixft.plan.scale import Regime, ScaledTrace, Sides, sample
from strixft.plan.stack import Ints, Kind, Schedule, stands_for
from strixft.plan.trace import RowShape, Trace, one_step
from strixft.recipe import Recipe
from strixft.step.room import ALIGNED


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
    """Answers for one recipe and model on one host.

    Args:
        recipe: Method, adapter and optimiser.
        config: The model's configuration.
        host: Decides dtype and attention operator.
    """

    def __init__(self, recipe: Recipe, config: Any, host: Host) -> None:
        self._recipe, self._config, self._host = recipe, config, host
        self._memo = Memo()
        self._scaled: dict[Any, ScaledTrace | None] = {}
        self._schedules: dict[Any, Schedule] = {}
        self._numbers: dict[Any, tuple[Ints, Seconds | None]] = {}

    def _sides(self) -> list[int]:
        """The model's own sides."""
        sides = [side for side in tree_iter(self._config.to_dict()) if type(side) is int]
        return [*{side for side in sides if side > 1}, self._recipe.lora.r]

    def _joined(self) -> list[int]:
        """Sides that joined matrices often have; any other one costs a second trace."""
        *sides, rank = self._sides()
        exact = [n * side + m * rank for side in sides for n in (1, 2) for m in (1, 2, 3)]
        return [*exact, *(width + -width % ALIGNED for width in exact)]

    def _trace(self, step: Step, regime: Regime, shape: RowShape, kinds: list[Kind]) -> Trace:
        """A trace of a micro-batch, from disk where it was made before."""
        about = regime, shape
        name = stored.name_of(self._recipe, self._config, self._host, about, kinds)
        found = stored.load(name)
        if found is None:
            layers = step.recomputed_layers
            found = trace_run(
                self._recipe, self._config, self._host, shape, layers, 2, self._memo
            ).trace
            stored.save(name, found)
        return found

    def _make(self, step: Step, regime: Regime, kinds: list[Kind]) -> ScaledTrace | None:
        scaled = self._sampled(step, regime, kinds, math.prod(self._sides()))
        return scaled if scaled and scaled.keeps_weights() else None

    def _sampled(
        self, step: Step, regime: Regime, kinds: list[Kind], taken: int
    ) -> ScaledTrace | None:
        """A trace whose primes divide nothing that is taken, nor the sides of joined matrices."""
        likely = math.prod(self._joined())
        traced = sample(self._config, regime, taken * likely)
        traced = traced or sample(self._config, regime, taken)
        if traced is None:
            return None
        trace = self._trace(step, regime, traced.shape, kinds)
        widths = math.prod(trace.widths)
        if math.gcd(widths, math.prod(traced.primes)) > 1:
            return self._sampled(step, regime, kinds, taken * widths)
        return ScaledTrace(trace, traced)

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
        sides = Sides.of(step.shape, self._config.get_text_config().vocab_size)
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
        return dry_run(
            self._recipe,
            self._config,
            self._host,
            step.shape,
            step.recomputed_layers,
            step.steps,
            self._memo,
        )
