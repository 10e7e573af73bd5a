"""Answers for other settings than a plan's, fast enough for a slider."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from strixft.catalog.methods import METHODS
from strixft.guard.host import budget_for
from strixft.plan.choose import DataShape, Planner
from strixft.plan.dry_run import Step
from strixft.plan.result import checked_job
from strixft.plan.scale import Traces
from strixft.prepare.stage import Prepared
from strixft.recipe.schema import Recipe
from strixft.step.loss import chunk_rows

WEIGHT_BYTES = {"native": 2.0, "int8": 1.01, "nf4": 0.516}
"""Bytes of a weight by storage of the base, for a first answer."""

OF_RANK = ("adapter", "gradients", "optimizer")
"""Parts that grow with the rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings that a person tries."""

    method: str
    rank: int
    length: int
    """`dataset.max_length`."""
    epochs: float
    rows: int | None
    """Rows of a micro-batch; None leaves them to the plan."""

    @classmethod
    def of(cls, recipe: Recipe) -> Settings:
        """Return the settings of a recipe."""
        asked = recipe.train.micro_batch
        return cls(
            method=recipe.method,
            rank=recipe.lora.r,
            length=recipe.dataset.max_length,
            epochs=recipe.train.epochs,
            rows=asked if isinstance(asked, int) else None,
        )

    def overrides(self, recipe: Recipe) -> dict[str, Any]:
        """Return what differs from a recipe, by dotted key."""
        before = Settings.of(recipe)._by_key()
        return {key: value for key, value in self._by_key().items() if value != before[key]}

    def _by_key(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "lora.r": self.rank,
            "dataset.max_length": self.length,
            "train.epochs": self.epochs,
            "train.micro_batch": self.rows or "auto",
        }

    def applied(self, recipe: Recipe) -> Recipe:
        """Return a recipe with these settings."""
        dataset = recipe.dataset.model_copy(update={"max_length": self.length})
        lora = recipe.lora.model_copy(update={"r": self.rank})
        train = {"epochs": self.epochs, "micro_batch": self.rows or "auto"}
        return recipe.model_copy(
            update={
                "method": self.method,
                "dataset": dataset,
                "lora": lora,
                "train": recipe.train.model_copy(update=train),
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Memory and time of some settings."""

    settings: Settings
    rows: int
    recomputed_layers: int
    parts: Mapping[str, int]
    """Bytes at the peak, by part."""
    beyond_bytes: int
    """Held by the allocator beyond the peak, and taken outside it."""
    budget_bytes: int
    tok_per_s: float | None
    seconds_per_update: float | None
    updates: int | None
    is_exact: bool
    """By the allocator's rules; a first answer may be a few per cent off."""

    @property
    def need_bytes(self) -> int:
        """Memory that the budget is held against."""
        return sum(self.parts.values()) + self.beyond_bytes

    @property
    def fits(self) -> bool:
        """Return whether it is within the budget."""
        return self.need_bytes <= self.budget_bytes

    @property
    def seconds_total(self) -> float | None:
        """Predicted time of the training."""
        known = self.seconds_per_update is not None and self.updates is not None
        return (self.seconds_per_update or 0) * (self.updates or 0) if known else None


def _adding_up(parts: Mapping[str, int], peak_bytes: int) -> dict[str, int]:
    """Return parts that add up to a peak; those that depend on the micro-batch are scaled."""
    static = ("weights", *OF_RANK)
    fixed = sum(parts[name] for name in static)
    scale = max(0, peak_bytes - fixed) / max(1, sum(parts.values()) - fixed)
    return {n: size if n in static else round(size * scale) for n, size in parts.items()}


def filled(data: DataShape, length: int) -> DataShape:
    """Return the shape of data whose rows would be of another length: of packed rows all full."""
    if length == data.max_length:
        return data
    longest = min(data.longest, length)
    if not data.lengths:
        return DataShape(length, longest=longest)
    share = sum(data.trained) / max(1, sum(data.lengths))
    if data.is_packed:
        count = max(1, math.ceil(sum(data.lengths) / length))
        documents = max(1, round(sum(data.documents) / count))
        trained = max(1, round(length * share))
        return DataShape(length, [length] * count, [trained] * count, [documents] * count, longest)
    kept = [row for row in zip(data.lengths, data.trained, strict=True) if row[0] <= length]
    lengths, trained_tokens = zip(*(kept or [(length, max(1, round(length * share)))]), strict=True)
    return DataShape(length, lengths, trained_tokens)


class Explorer:
    """Answers for any settings of a recipe on a host.

    Args:
        recipe: The recipe to begin with.
        prepared: Its data; without them rows are as long as `max_length`.

    Raises:
        StrixftError: The recipe cannot be planned on its host.
    """

    def __init__(self, recipe: Recipe, prepared: Prepared | None) -> None:
        self.recipe = recipe
        self._job = checked_job(recipe, recipe.memory.host)
        self.limit = budget_for(recipe.memory, self._job.host)
        self._data = DataShape.of(recipe, prepared, packed=self._job.options.backend.packed)
        self._traces: dict[tuple[str, int], Traces] = {}
        self._planners: dict[Settings, Planner] = {}
        self.start = Settings.of(recipe)
        self.last = self.exact(self.start)
        """The newest exact answer; at first that of the recipe."""

    @property
    def host_name(self) -> str:
        """The machine that is planned for."""
        return self._job.host.name

    def _planner(self, settings: Settings) -> Planner:
        if settings not in self._planners:
            job = self._job.with_recipe(settings.applied(self.recipe))
            planner = Planner(job, filled(self._data, settings.length))
            key = settings.method, settings.rank
            planner.traces = self._traces.setdefault(key, planner.traces)
            self._planners[settings] = planner
        return self._planners[settings]

    def rows(self, settings: Settings) -> list[int]:
        """Return the rows that the planner chooses from, fewest first."""
        return sorted(self._planner(replace(settings, rows=None)).rows())

    def need_by_rows(self, settings: Settings) -> dict[int, int]:
        """Return the memory of each number of rows, with as few layers recomputed as fit."""
        planner = self._planner(replace(settings, rows=None))
        found = (planner.fewest_recomputed(rows, self.limit) for rows in self.rows(settings))
        return {candidate.rows: candidate.need_bytes for candidate in found}

    def exact(self, settings: Settings) -> Answer:
        """Return the fastest plan of these settings that fits, the smallest one if none fits.

        Takes as long as planning where the like was not traced before.
        """
        planner = self._planner(settings)
        run = planner.choose(self.limit).run
        beyond = planner.need_bytes(run) - run.peak_bytes
        step = planner.step(run.shape.rows, run.recomputed_layers)
        found = self._answer(settings, step, run.parts, beyond, run.seconds_per_update)
        self.last = replace(found, is_exact=True)
        return self.last

    def at_once(self, settings: Settings) -> Answer:
        """Return a first answer within milliseconds; nothing is traced for it."""
        planner, last = self._planner(settings), self.last
        step = planner.step(settings.rows or last.rows, last.recomputed_layers)
        parts, seconds = self._scaled(settings, step), None
        if planner.traces.is_traced(step):
            found = planner.candidate_of(step, planner.data)
            seconds = found.seconds_per_update
            parts = _adding_up(parts, found.need_bytes - planner.outside_bytes)
        held = last.beyond_bytes - planner.outside_bytes
        grown = sum(parts.values()) / max(1, sum(last.parts.values()))
        beyond = planner.outside_bytes + round(held * grown)
        return self._answer(settings, step, parts, beyond, seconds)

    def _scaled(self, settings: Settings, step: Step) -> dict[str, int]:
        """Return the parts of the last exact answer for other settings, by proportion."""
        last, before = self.last, self.last.settings
        planner = self._planner(before)
        old, new = planner.step(last.rows, last.recomputed_layers).shape, step.shape
        vocabulary = self._job.config.get_text_config().vocab_size
        parts: dict[str, float] = {**last.parts}
        parts["activations"] *= new.rows * new.length / (old.rows * old.length)
        chunks = (chunk_rows(shape.trained, vocabulary) for shape in (new, old))
        parts["head"] *= next(chunks) / next(chunks)
        method_before, method = METHODS[before.method], METHODS[settings.method]
        weights = parts["weights"] / WEIGHT_BYTES[method_before.base]
        parts["weights"] = weights * WEIGHT_BYTES[method.base]
        if method.adapter == method_before.adapter == "none":
            pass
        elif method.adapter == "none":
            parts |= {"adapter": 0, "gradients": 2 * weights, "optimizer": 8 * weights}
        elif method_before.adapter == "none":
            parts |= dict.fromkeys(OF_RANK, 0.01 * weights)
        else:
            parts |= {name: parts[name] * settings.rank / before.rank for name in OF_RANK}
        return {name: round(size) for name, size in parts.items()}

    def _answer(
        self,
        settings: Settings,
        step: Step,
        parts: Mapping[str, int],
        beyond_bytes: int,
        seconds: float | None,
    ) -> Answer:
        planner = self._planner(settings)
        data, rows = planner.data, step.shape.rows
        rate = rows * step.steps * data.mean_length() / seconds if seconds else None
        return Answer(
            settings=settings,
            rows=rows,
            recomputed_layers=step.recomputed_layers,
            parts=parts,
            beyond_bytes=beyond_bytes,
            budget_bytes=self.limit.num_bytes,
            tok_per_s=rate,
            seconds_per_update=seconds,
            updates=data.updates(planner.recipe, rows),
            is_exact=False,
        )
