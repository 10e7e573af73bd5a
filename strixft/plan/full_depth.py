"""A deep model's trace from that of a few layers.

Decoder layers of one kind do the same in the same order. So a trace with one layer of each kind,
between a first and a last one, holds every event of the deep model; here they are put together
again, layer by layer, with storages of their own. Storages that one layer hands to the next are
matched by their order among those that leave a layer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import numpy.typing as npt

from strixft.model.architecture import sample_layers
from strixft.plan.cost import Floats, Seconds
from strixft.plan.trace import Place, Segment, Trace
from strixft.step.tracker import BLOCK

Kind = Hashable

Key = tuple[int, int | None]
"""Storage of the small trace, and the deep model's layer it stands for."""

Ints = npt.NDArray[np.int64]


def rounded_all(num_bytes: Ints) -> Ints:
    """Bytes of the allocator's blocks; see `tracker.rounded`."""
    blocks: Ints = -(-num_bytes // BLOCK) * BLOCK
    return blocks


def stands_for(kinds: Sequence[Kind]) -> list[int]:
    """For each layer of the deep model, which of `sample_layers` stands for it."""
    sampled = sample_layers(kinds)
    of_kind = {kinds[layer]: index for index, layer in enumerate(sampled[1:-1], start=1)}
    return [0, *(of_kind[kind] for kind in kinds[1:-1]), len(sampled) - 1]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Allocations and frees of a deep model, one by one."""

    storages: list[int]
    """For each block, the small trace's storage whose size it has."""
    events: list[int]
    """A block's number where it is allocated; `~number` where it is freed."""


class Schedule:
    """What happens in a model of full depth, told by a trace's storages.

    Args:
        trace: Of a few layers, or of all.
        stands_for: For each layer of the deep model, the layer of the trace that stands for it;
            None where the trace is of all layers.
    """

    def __init__(self, trace: Trace, stands_for: Sequence[int] | None = None) -> None:
        self.trace = trace
        self._stands_for = stands_for
        self.num_layers = trace.num_layers if stands_for is None else len(stands_for)

    @cached_property
    def blocks(self) -> Blocks:
        """Each block of the deep model."""
        if self._stands_for is not None:
            return _Stack(self.trace, self._stands_for).build()
        events = [index if born else ~index for _, index, born in self.trace.events]
        return Blocks(list(range(len(self.trace.storages))), events)

    @cached_property
    def changes(self) -> Ints:
        """Storages in the order of their births, and `~storage` where one dies."""
        if self._stands_for is not None:
            return _changes(self.trace, self._stands_for)
        return np.array([index if born else ~index for _, index, born in self.trace.events])

    def live_bytes(self, sizes: Ints) -> Ints:
        """Bytes alive after each change, if the trace's storages have these sizes."""
        signed = np.concatenate([sizes, -sizes[::-1]])  # ~storage counts from the end
        return np.cumsum(signed[self.changes])

    def seconds_per_update(self, sizes: Ints, seconds: Seconds | None, steps: int) -> float | None:
        """Return the predicted time of an update.

        Each place takes the longer of device and launches, and the whole no less than all that the
        processor does.

        Args:
            sizes: Of the trace's storages.
            seconds: Of each piece of the trace's work; None where the host's rates are not known.
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
        """For each piece of work, layers that do it in the last micro-batch; and the update's."""
        places, numbers = self.trace.work_places
        last = max((place.micro_batch for place in places), default=0)
        of_last = [self._count(p.layer) if p.micro_batch == last else 0 for p in places]
        updates = [p.micro_batch == last and p.phase == "update" for p in places]
        return np.array(of_last, dtype=np.float64)[numbers], np.array(updates, dtype=bool)[numbers]

    def _count(self, layer: int | None) -> int:
        return 1 if layer is None or self._stands_for is None else self._stands_for.count(layer)

    @cached_property
    def _trained(self) -> tuple[Ints, Ints]:
        """Trained storages, and how many layers have the like."""
        trained = [i for i, s in enumerate(self.trace.storages) if s.part == "adapter"]
        counts = [self._count(self.trace.storages[i].born.layer) for i in trained]
        return np.array(trained, dtype=np.int64), np.array(counts, dtype=np.int64)

    def _trained_growth(self, sizes: Ints) -> tuple[float, float]:
        """Trained bytes of the deep model ÷ those of the trace; the same for trained tensors."""
        trained, counts = self._trained
        return float(sizes[trained] @ counts / sizes[trained].sum()), float(counts.mean())


def _passes(trace: Trace, stands_for: Sequence[int]) -> Iterator[tuple[int, Segment, int | None]]:
    """Segments of the trace with the deep layers they are emitted for, numbered, in order."""
    layers = range(len(stands_for))
    by_pass = groupby(
        enumerate(trace.segments),
        key=lambda s: (s[1].place.micro_batch, s[1].place.phase, s[1].place.layer is None),
    )
    for (_, phase, is_global), group in by_pass:
        segments = list(group)
        if is_global or phase == "update":
            yield from ((number, segment, None) for number, segment in segments)
            continue
        by_layer = defaultdict(list)
        for number, segment in segments:
            by_layer[segment.place.layer].append((number, segment))
        for layer in reversed(layers) if phase == "backward" else layers:
            for number, segment in by_layer[stands_for[layer]]:
                yield number, segment, layer


class _Stack:
    """Builds the blocks of the deep model."""

    def __init__(self, trace: Trace, stands_for: Sequence[int]) -> None:
        self._trace = trace
        self._stands_for = stands_for
        self._deep = Blocks([], [])
        self._alive: dict[Key, int] = {}
        self._leaving = self._find_leaving()
        self._uses: Counter[int] = Counter()

    def _find_leaving(self) -> dict[Place, list[int]]:
        """Storages that die in another layer than they were born in, by birth place, in order."""
        leaving: dict[Place, list[int]] = defaultdict(list)
        for index, storage in enumerate(self._trace.storages):
            born, died = storage.born, storage.died
            if died and None not in (born.layer, died.layer) and born.layer != died.layer:
                leaving[born].append(index)
        return leaving

    def _resolve(self, index: int, layer: int | None) -> Key:
        """The deep model's storage that a free in this layer means."""
        born = self._trace.storages[index].born
        if born.layer is None:
            return index, None
        if layer is None:  # freed outside the layers: it is the last layer's, or the first's
            deep_layer = len(self._stands_for) - 1 if born.layer else 0
            return index, deep_layer
        here = self._stands_for[layer]
        deep_layer = layer + born.layer - here
        there = self._stands_for[deep_layer]
        if there == born.layer:
            return index, deep_layer
        order = self._leaving[born].index(index)
        twin = Place(born.micro_batch, born.phase, there)
        return self._leaving[twin][order], deep_layer

    def _allocate(self, index: int, layer: int | None) -> None:
        self._alive[index, layer] = len(self._deep.storages)
        self._deep.events.append(len(self._deep.storages))
        self._deep.storages.append(index)

    def _free(self, key: Key) -> None:
        self._deep.events.append(~self._alive.pop(key))

    def _emit(self, events: Sequence[tuple[int, bool]], layer: int | None) -> None:
        for index, born in events:
            if born:
                self._allocate(index, layer)
            elif layer is None or self._is_last_use(index, layer):
                self._free(self._resolve(index, layer))

    def _is_last_use(self, index: int, layer: int) -> bool:
        """Whether a free in this layer is the one that counts.

        What was born outside the layers, such as a mask, is freed by the last layer of its kind.
        """
        if self._trace.storages[index].born.layer is not None:
            return True
        self._uses[index] += 1
        return self._uses[index] == self._stands_for.count(self._stands_for[layer])

    def _emit_update(self, segment: Segment) -> None:
        """The optimiser's states of every layer are born, the gradients of every layer die."""
        for index, born in segment.events:
            of_layer = self._trace.storages[index].born.layer
            if of_layer is None:
                self._emit([(index, born)], None)
                continue
            for layer, sample in enumerate(self._stands_for):
                if sample == of_layer and born:
                    self._allocate(index, layer)
                elif sample == of_layer:
                    self._free((index, layer))

    def build(self) -> Blocks:
        """The deep model's blocks."""
        for _, segment, layer in _passes(self._trace, self._stands_for):
            if segment.place.phase == "update":
                self._emit_update(segment)
            else:
                self._emit(segment.events, layer)
        return self._deep


def _change_of(trace: Trace, segment: Segment, stands_for: Sequence[int], *, is_last: bool) -> Ints:
    """Storages born in a segment, and `~storage` of those that die in it."""
    found: list[int] = []
    for index, born in segment.events:
        layer = trace.storages[index].born.layer
        change = index if born else ~index
        if segment.place.phase == "update" and layer is not None:
            found += [change] * stands_for.count(layer)
        elif born or is_last or layer is not None:  # see `_Stack._is_last_use`
            found.append(change)
    return np.array(found, dtype=np.int64)


def _changes(trace: Trace, stands_for: Sequence[int]) -> Ints:
    """What `_Stack` does to the live bytes, segment by segment instead of block by block."""
    pieces = list(_passes(trace, stands_for))
    last_layer = {number: layer for number, _, layer in pieces}
    made: dict[tuple[int, bool], Ints] = {}
    for number, segment, layer in pieces:
        is_last = last_layer[number] == layer
        if (number, is_last) not in made:
            made[number, is_last] = _change_of(trace, segment, stands_for, is_last=is_last)
    return np.concatenate([made[n, last_layer[n] == layer] for n, _, layer in pieces])
