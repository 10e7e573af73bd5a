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
from itertools import groupby

from strixft.plan.trace import Place, Storage, Trace

Kind = Hashable
Key = tuple[int, int | None]
"""Storage of the small trace, and the deep model's layer it stands for."""


def sample_layers(kinds: Sequence[Kind]) -> list[int]:
    """Layers of a deep model that stand for all: first, one of each kind between, last.

    >>> sample_layers("rrrrkkkk")
    [0, 1, 4, 7]
    """
    middle = range(1, len(kinds) - 1)
    first_of = {kinds[index]: index for index in reversed(middle)}
    return [0, *sorted(first_of.values()), len(kinds) - 1]


@dataclass(frozen=True, slots=True)
class _Segment:
    place: Place
    events: list[tuple[int, bool]]


def _segments(trace: Trace) -> list[_Segment]:
    groups = groupby(trace.events, key=lambda event: event[0])
    return [_Segment(place, [(i, born) for _, i, born in events]) for place, events in groups]


def _trained_bytes(trace: Trace) -> int:
    return sum(storage.size for storage in trace.storages if storage.part == "adapter")


class _Stack:
    """Builds the deep trace."""

    def __init__(self, trace: Trace, sampled: Sequence[int], kinds: Sequence[Kind]) -> None:
        self.small = trace
        self.deep = Trace(len(kinds))
        self._stands_for = self._samples(sampled, kinds)
        self._alive: dict[Key, int] = {}
        self._leaving = self._find_leaving()
        self._uses: Counter[int] = Counter()

    @staticmethod
    def _samples(sampled: Sequence[int], kinds: Sequence[Kind]) -> list[int]:
        """For each layer of the deep model, the layer of the small one that stands for it."""
        of_kind = {kinds[layer]: index for index, layer in enumerate(sampled[1:-1], start=1)}
        middle = [of_kind[kind] for kind in kinds[1:-1]]
        return [0, *middle, len(sampled) - 1]

    def _find_leaving(self) -> dict[Place, list[int]]:
        """Storages that die in another layer than they were born in, by birth place, in order."""
        leaving: dict[Place, list[int]] = defaultdict(list)
        for index, storage in enumerate(self.small.storages):
            born, died = storage.born, storage.died
            if died and None not in (born.layer, died.layer) and born.layer != died.layer:
                leaving[born].append(index)
        return leaving

    def _resolve(self, index: int, layer: int | None) -> Key:
        """The deep model's storage that a free in this layer means."""
        born = self.small.storages[index].born
        if born.layer is None:
            return index, None
        if layer is None:  # freed outside the layers: it is the last layer's, or the first's
            deep_layer = self.deep.num_layers - 1 if born.layer else 0
            return index, deep_layer
        here = self._stands_for[layer]
        deep_layer = layer + born.layer - here
        there = self._stands_for[deep_layer]
        if there == born.layer:
            return index, deep_layer
        order = self._leaving[born].index(index)
        twin = Place(born.micro_batch, born.phase, there)
        return self._leaving[twin][order], deep_layer

    def _allocate(self, index: int, place: Place) -> None:
        storage = self.small.storages[index]
        self._alive[index, place.layer] = len(self.deep.storages)
        self.deep.events.append((place, len(self.deep.storages), True))
        self.deep.storages.append(Storage(storage.size, storage.part, place))

    def _free(self, key: Key, place: Place) -> None:
        deep = self._alive.pop(key)
        self.deep.storages[deep].died = place
        self.deep.events.append((place, deep, False))

    def _emit(self, segment: _Segment, layer: int | None) -> None:
        place = Place(segment.place.micro_batch, segment.place.phase, layer)
        for index, born in segment.events:
            if born:
                self._allocate(index, place)
            elif layer is None or self._is_last_use(index, layer):
                self._free(self._resolve(index, layer), place)

    def _is_last_use(self, index: int, layer: int) -> bool:
        """Whether a free in this layer is the one that counts.

        What was born outside the layers, such as a mask, is freed by the last layer of its kind.
        """
        if self.small.storages[index].born.layer is not None:
            return True
        self._uses[index] += 1
        return self._uses[index] == self._stands_for.count(self._stands_for[layer])

    def _emit_update(self, segment: _Segment) -> None:
        """The optimiser's states of every layer are born, the gradients of every layer die."""
        place = segment.place
        for index, born in segment.events:
            storage = self.small.storages[index]
            of_layer = storage.born.layer
            if of_layer is None:
                self._emit(_Segment(place, [(index, born)]), None)
                continue
            for layer, sample in enumerate(self._stands_for):
                if sample == of_layer and born:
                    self._allocate(index, Place(place.micro_batch, place.phase, layer))
                elif sample == of_layer:
                    self._free((index, layer), place)

    def _passes(self) -> Iterator[tuple[_Segment, int | None]]:
        """Segments of the small trace with the deep layers they are emitted for, in order."""
        layers = range(self.deep.num_layers)
        by_pass = groupby(
            _segments(self.small),
            key=lambda s: (s.place.micro_batch, s.place.phase, s.place.layer is None),
        )
        for (_, phase, is_global), group in by_pass:
            segments = list(group)
            if is_global or phase == "update":
                yield from ((segment, None) for segment in segments)
                continue
            by_layer = defaultdict(list)
            for segment in segments:
                by_layer[segment.place.layer].append(segment)
            for layer in reversed(layers) if phase == "backward" else layers:
                for segment in by_layer[self._stands_for[layer]]:
                    yield segment, layer

    def build(self) -> Trace:
        """The deep trace."""
        for segment, layer in self._passes():
            if segment.place.phase == "update":
                self._emit_update(segment)
            else:
                self._emit(segment, layer)
        self.deep.seconds = dict(self._seconds())
        return self.deep

    def _seconds(self) -> Iterator[tuple[Place, float]]:
        more_trained = _trained_bytes(self.deep) / _trained_bytes(self.small)
        for place, seconds in self.small.seconds.items():
            if place.phase == "update":
                yield place, seconds * more_trained
            elif place.layer is None:
                yield place, seconds
            else:
                yield place, seconds * self._stands_for.count(place.layer)


def stack_layers(trace: Trace, sampled: Sequence[int], kinds: Sequence[Kind]) -> Trace:
    """The trace of a deep model.

    Args:
        trace: Of a model whose layers are those that `sample_layers` named.
        sampled: These layers.
        kinds: Kind of each layer of the deep model.
    """
    return _Stack(trace, sampled, kinds).build()
