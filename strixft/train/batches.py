"""Micro-batches of the updates of a training, from its prepared rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from strixft.data.batches import (
    Batch,
    PackedShape,
    collate,
    on_device,
    rows_of_run,
    training_order,
)
from strixft.prepare.stage import Prepared
from strixft.probe.job import Job


class TrainingBatches:
    """Micro-batches of each update, in the order of training."""

    def __init__(self, job: Job, prepared: Prepared, choice: dict[str, Any]) -> None:
        recipe, shape = job.recipe, choice["packed"]
        self._prepared, self._device = prepared, job.host.device
        self._size, self._steps = choice["micro_batch_rows"], choice["gradient_accumulation_steps"]
        self._shape = PackedShape(**shape) if shape else None
        self._rows: Any = (
            prepared.packed_rows(recipe.dataset)
            if shape
            else prepared.token_rows(recipe.dataset).train
        )
        sizes = self._rows.sums("num_trained").tolist() if shape else self._rows["length"]
        num_rows = rows_of_run(len(sizes), recipe.train, self._size * self._steps)
        seed, padded = recipe.train.seed, not shape
        self._order = training_order(sizes, num_rows, seed, self._size, padded=padded)

    def _numbers(self, update: int) -> list[list[int]]:
        """Return the rows of each micro-batch of an update; the last update may have fewer."""
        per_update = self._steps * self._size
        chosen = self._order[update * per_update : (update + 1) * per_update]
        return [chosen[start : start + self._size] for start in range(0, len(chosen), self._size)]

    def __call__(self, update: int) -> list[Batch]:
        """Return the micro-batches of an update, counted from 0, on the device."""
        found = []
        for numbers in self._numbers(update):
            rows = self._rows.take(numbers) if self._shape else [self._rows[n] for n in numbers]
            found.append(on_device(collate(rows, self._shape), self._device))
        return found

    def names(self, update: int, micro_batches: Iterable[int]) -> list[str]:
        """Return the rows of some micro-batches of an update, by file and number."""
        numbers = self._numbers(update)
        chosen = [row for step in micro_batches for row in numbers[step]]
        return self._prepared.names_of(self._rows, chosen)
