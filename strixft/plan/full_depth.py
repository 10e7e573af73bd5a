"""A deep model's events, from the trace of a few of its layers.

Decoder layers of one kind do the same in the same order. So a trace with one layer of each kind,
between a first and a last one, holds every event of the deep model. Here they are put together
again, layer by layer, each layer with storages of its own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property
from itertools import groupby

import numpy as np
import numpy.typing as npt

from strixft.model.architecture import sample_layers
from strixft.plan.cost import Floats, Seconds
from strixft.plan.trace import Place, Segment, Trace
from strixft.step.tracker import BLOCK

Kind = Hashable

Ints = npt.NDArray[np.int64]


def rounded_all(num_bytes: Ints) -> Ints:
    """Return bytes of the allocator's blocks, any shape; see `tracker.rounded`."""
    blocks: Ints = -(-num_bytes // BLOCK) * BLOCK
    return blocks


def stands_for(kinds: Sequence[Kind]) -> list[int]:
    """Return, for each layer of the deep model, which of `sample_layers` stands for it."""
    sampled = sample_layers(kinds)
    of_kind = {kinds[layer]: index for index, layer in enumerate(sampled[1:-1], start=1)}
    return [0, *(of_kind[kind] for kind in kinds[1:-1]), len(sampled) - 1]


class Schedule:
    """The events of a model of full depth, told by a trace's storages.

    Letters: S storages of the trace, W pieces of its work, E events of the deep model.

    Args:
        trace: Of a few layers, or of all.
        stands_for: For each layer of the deep model, the layer of the trace that stands for it;
            None where the trace is of all layers.
    """

    def __init__(self, trace: Trace, stands_for: Sequence[int] | None = None) -> None:
        self.trace = trace
        self._stands_for = range(trace.num_layers) if stands_for is None else stands_for
        self.num_layers = len(self._stands_for)
        self._copies = Counter[int | None]([None, *self._stands_for])
        """Layers of the deep model that each layer of the trace stands for."""

    @cached_property
    def _passes(self) -> list[tuple[int, Segment, int | None]]:
        """The trace's segments with the deep layers that they are repeated for, in order."""
        found: list[tuple[int, Segment, int | None]] = []
        by_pass = groupby(
            enumerate(self.trace.segments),
            key=lambda s: (s[1].place.micro_batch, s[1].place.phase, s[1].place.layer is None),
        )
        for (_, phase, is_global), group in by_pass:
            if is_global or phase == "update":
                found += [(number, segment, None) for number, segment in group]
                continue
            by_layer = defaultdict(list)
            for number, segment in group:
                by_layer[segment.place.layer].append((number, segment))
            layers = list(enumerate(self._stands_for))
            for deep, sample in reversed(layers) if phase == "backward" else layers:
                found += [(number, segment, deep) for number, segment in by_layer[sample]]
        return found

    def _events(
        self, segment: Segment, layer: int | None, *, is_last: bool
    ) -> Iterator[tuple[int, int | None]]:
        """Yield what a segment does in a deep layer.

        Args:
            segment: Of the trace.
            layer: The deep layer, None outside the layers.
            is_last: Whether no later layer repeats the segment.

        Yields:
            A storage where it is allocated, `~storage` where it is freed; and the deep layer that
            it belongs to.
        """
        for index, is_born in segment.events:
            owner, change = self.trace.storages[index].born.layer, index if is_born else ~index
            if owner is None:
                if is_born or is_last:  # a mask, say, is freed by the last layer that reads it
                    yield change, None
            elif segment.place.phase == "update":  # gradients and optimiser state of every layer
                yield from (
                    (change, n) for n, stands in enumerate(self._stands_for) if stands == owner
                )
            elif layer is None:  # freed outside the layers
                yield change, self._last_copy[owner]
            else:  # the layer's own, or handed on by the one before or behind it
                yield change, layer + owner - self._stands_for[layer]

    @cached_property
    def _last_copy(self) -> dict[int, int]:
        """The last deep layer that each layer of the trace stands for."""
        return {sample: deep for deep, sample in enumerate(self._stands_for)}

    @cached_property
    def _last_repeat(self) -> dict[int, int | None]:
        """The deep layer that each segment is repeated for last."""
        return {number: layer for number, _, layer in self._passes}

    @cached_property
    def changes(self) -> Ints:
        """Storages in the order of their births, and `~storage` where one dies; (E,)."""
        made: dict[tuple[int, bool], Ints] = {}  # the same for every layer but the last
        pieces = []
        for number, segment, layer in self._passes:
            is_last = self._last_repeat[number] == layer
            if (number, is_last) not in made:
                events = self._events(segment, layer, is_last=is_last)
                made[number, is_last] = np.array([change for change, _ in events], dtype=np.int64)
            pieces.append(made[number, is_last])
        return np.concatenate(pieces)

    @cached_property
    def blocks(self) -> tuple[list[int], list[int]]:
        """Each block of the deep model: the storage whose size it has; and the events, (E,).

        An event is a block's number where it is allocated, `~number` where it is freed.
        """
        storages, events = list[int](), list[int]()
        alive: dict[tuple[Hashable, int | None], int] = {}
        twins = self._twins
        for number, segment, layer in self._passes:
            is_last = self._last_repeat[number] == layer
            for change, deep in self._events(segment, layer, is_last=is_last):
                index = max(change, ~change)
                key = twins.get(index, index), deep
                if change < 0:
                    events.append(~alive.pop(key))
                    continue
                alive[key] = len(storages)
                events.append(len(storages))
                storages.append(index)
        return storages, events

    @cached_property
    def _twins(self) -> dict[int, Hashable]:
        """Name storages that a layer hands on by their order among those.

        Whoever frees one means that of the layer beside it, which may be of another kind.
        """
        found: dict[int, Hashable] = {}
        handed_on = Counter[Place]()
        for index, storage in enumerate(self.trace.storages):
            born, died = storage.born, storage.died
            if died and None not in (born.layer, died.layer) and born.layer != died.layer:
                found[index] = born.micro_batch, born.phase, handed_on[born]
                handed_on[born] += 1
        return found

    def live_bytes(self, sizes: Ints) -> Ints:
        """Return the bytes alive after each event, (E,), where storages have these sizes, (S,)."""
        signed = np.concatenate([sizes, -sizes[::-1]])  # ~storage counts from the end
        return np.cumsum(signed[self.changes])

    def seconds_per_update(self, sizes: Ints, seconds: Seconds | None, steps: int) -> float | None:
        """Return the predicted time of an update.

        Each place takes the longer of device and launches, and the whole no less than all that the
        processor does.

        Args:
            sizes: Bytes of the trace's storages, (S,).
            seconds: Of each piece of work, (W,); None where the host's rates are not known.
            steps: Micro-batches of an update; each does what the trace's last one does.
        """
        if seconds is None:
            return None
        counts, is_update = self._counts
        more_bytes, more_tensors = self._trained_growth(sizes)
        device = np.where(is_update, more_bytes, steps * counts) * seconds.device
        launch = np.where(is_update, more_tensors, steps * counts) * seconds.launch
        places = (np.bincount(self.trace.work_places[1], each) for each in (device, launch))
        processor = float(launch.sum()) + steps * seconds.python_s
        return max(float(np.maximum(*places).sum()), processor)

    @cached_property
    def _counts(self) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Layers that do each piece of work, (W,), in the last micro-batch; the update's pieces."""
        places, numbers = self.trace.work_places
        last = max((place.micro_batch for place in places), default=0)
        of_last = [self._copies[p.layer] if p.micro_batch == last else 0 for p in places]
        updates = [p.micro_batch == last and p.phase == "update" for p in places]
        return np.array(of_last, dtype=np.float64)[numbers], np.array(updates, dtype=bool)[numbers]

    def _trained_growth(self, sizes: Ints) -> tuple[float, float]:
        """Return trained bytes of the deep model ÷ the trace's; the same for trained tensors."""
        trained = [i for i, s in enumerate(self.trace.storages) if s.part == "adapter"]
        copies = np.array([self._copies[self.trace.storages[i].born.layer] for i in trained])
        return float(sizes[trained] @ copies / sizes[trained].sum()), float(copies.mean())
