"""Reserved memory: allocations replayed through the rules of torch's caching allocator.

Rules and sizes are those of c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h of
torch 2.14; the HIP build is the same source. Blocks of up to 1 MiB come from segments of 2 MiB,
blocks below 10 MiB from segments of 20 MiB, larger ones get a segment of their own, in steps of
2 MiB. The smallest free block that is large enough is taken, and split if enough is left over.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from strixft.step.tracker import BLOCK
from strixft.units import MIB

SMALL_SIZE = MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT = 10 * MIB
ROUND_LARGE = 2 * MIB

Mode = Literal["default", "expandable"]


@dataclass(eq=False, slots=True)
class _Block:
    address: int
    size: int
    free: bool = True
    before: _Block | None = None
    after: _Block | None = None


class _Pool:
    """Free blocks of small or of large requests."""

    def __init__(self, *, small: bool, expandable: bool) -> None:
        self.reserved = 0
        self._least_rest = BLOCK if small or expandable else SMALL_SIZE + 1
        self._segment = SMALL_SEGMENT if small else LARGE_SEGMENT
        self._expandable = expandable
        self._small = small
        self._free: list[tuple[int, int]] = []
        self._at: dict[int, _Block] = {}
        self._end = 0
        self._last: _Block | None = None

    def allocate(self, size: int) -> _Block:
        """The best free block, or a new segment's."""
        index = bisect_left(self._free, (size, 0))
        if index == len(self._free):
            self._grow(size)
            index = bisect_left(self._free, (size, 0))
        _, address = self._free.pop(index)
        block = self._at[address]
        block.free = False
        if block.size - size >= self._least_rest:
            self._split(block, size)
        return block

    def free(self, block: _Block) -> None:
        """Give a block back and merge it with free neighbours."""
        block.free = True
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._remove(other)
                block = self._merge(*sorted((block, other), key=lambda part: part.address))
        self._add(block)

    def _grow(self, size: int) -> None:
        if self._expandable:
            self._extend(size)
            return
        own = not self._small and size >= OWN_SEGMENT
        length = -(-size // ROUND_LARGE) * ROUND_LARGE if own else self._segment
        self._new_block(length)

    def _new_block(self, length: int, before: _Block | None = None) -> _Block:
        block = _Block(self._end, length, before=before)
        if before is not None:
            before.after = block
        self._end += length
        self.reserved += length
        self._at[block.address] = block
        insort(self._free, (block.size, block.address))
        return block

    def _extend(self, size: int) -> None:
        """Expandable segments: map more pages at the end of the one range."""
        last = self._last
        missing = size - (last.size if last is not None and last.free else 0)
        self._last = self._new_block(-(-missing // self._segment) * self._segment, last)
        if last is not None and last.free:
            self._remove(self._last)
            self._remove(last)
            self._last = self._merge(last, self._last)
            self._add(self._last)

    def _split(self, block: _Block, size: int) -> None:
        rest = _Block(block.address + size, block.size - size, before=block, after=block.after)
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        if self._last is block:
            self._last = rest
        self._add(rest)

    def _merge(self, left: _Block, right: _Block) -> _Block:
        left.size += right.size
        left.after = right.after
        left.free = True
        if right.after is not None:
            right.after.before = left
        self._at.pop(right.address, None)
        if self._last is right:
            self._last = left
        return left

    def _add(self, block: _Block) -> None:
        self._at[block.address] = block
        insort(self._free, (block.size, block.address))

    def _remove(self, block: _Block) -> None:
        del self._free[bisect_left(self._free, (block.size, block.address))]


@dataclass(frozen=True, slots=True)
class Replay:
    """What the allocator would have reported."""

    allocated_bytes: int
    """Peak of `memory_allocated`: blocks, with the rests that were too small to split off."""
    reserved_bytes: int


def replay(sizes: Sequence[int], events: Iterable[int], mode: Mode = "default") -> Replay:
    """Replay allocations and frees, in order.

    Args:
        sizes: Bytes of each block, rounded to the allocator's.
        events: A block's number where it is allocated, `~number` where it is freed.
        mode: `default`, or `expandable` for `expandable_segments:True`.
    """
    expandable = mode == "expandable"
    pools = [_Pool(small=small, expandable=expandable) for small in (False, True)]
    blocks: dict[int, _Block] = {}
    allocated = peak = 0
    for event in events:
        if event >= 0:
            size = max(sizes[event], BLOCK)
            block = blocks[event] = pools[size <= SMALL_SIZE].allocate(size)
            allocated += block.size
            peak = max(peak, allocated)
        else:
            block = blocks.pop(~event)
            allocated -= block.size
            pools[sizes[~event] <= SMALL_SIZE].free(block)
    return Replay(peak, sum(pool.reserved for pool in pools))
