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

from strixft.step.memory_tracker import BLOCK
from strixft.support.units import MIB

SMALL_SIZE = MIB

SMALL_SEGMENT = 2 * MIB

LARGE_SEGMENT = 20 * MIB

OWN_SEGMENT = 10 * MIB

ROUND_LARGE = 2 * MIB

ADDRESS_BITS = 40
"""Lower bits of a free block's number; its size is above them."""

ADDRESS_MASK = (1 << ADDRESS_BITS) - 1


class _Pool:
    """Free blocks of small or of large requests; sizes and addresses in units of `BLOCK`.

    A free block is one number, its size above its address, so that sorted numbers are in the order
    in which the allocator looks. Neighbours are found by where a free block begins and ends.
    """

    def __init__(self, *, small: bool) -> None:
        self.reserved = 0
        self._least_rest = 1 if small else SMALL_SIZE // BLOCK + 1
        self._segment = (SMALL_SEGMENT if small else LARGE_SEGMENT) // BLOCK
        self._small = small
        self._free: list[int] = []
        self._size_at: dict[int, int] = {}
        self._start_at: dict[int, int] = {}
        self._end = 0

    def allocate(self, size: int) -> tuple[int, int]:
        """Return address and size of the best free block, or of a new segment's."""
        index = bisect_left(self._free, size << ADDRESS_BITS)
        if index == len(self._free):
            self._grow(size)
            index = bisect_left(self._free, size << ADDRESS_BITS)
        block = self._free.pop(index)
        whole, address = block >> ADDRESS_BITS, block & ADDRESS_MASK
        del self._size_at[address]
        rest = whole - size
        if rest < self._least_rest:
            del self._start_at[address + whole]
            return address, whole
        start = address + size
        self._size_at[start], self._start_at[address + whole] = rest, start
        insort(self._free, rest << ADDRESS_BITS | start)
        return address, size

    def free(self, address: int, size: int) -> None:
        """Give a block back and merge it with free neighbours."""
        end = address + size
        left = self._start_at.pop(address, None)
        if left is not None:
            self._remove(left, self._size_at[left])
            address = left
        right = self._size_at.pop(end, None)
        if right is not None:
            self._remove(end, right)
            end += right
        size = end - address
        self._size_at[address], self._start_at[end] = size, address
        insort(self._free, size << ADDRESS_BITS | address)

    def _remove(self, address: int, size: int) -> None:
        del self._free[bisect_left(self._free, size << ADDRESS_BITS | address)]

    def _grow(self, size: int) -> None:
        own, steps = not self._small and size >= OWN_SEGMENT // BLOCK, ROUND_LARGE // BLOCK
        length = -(-size // steps) * steps if own else self._segment
        start = self._end + 1  # a gap: blocks of two segments are not merged
        self._end = start + length
        self.reserved += length
        self.free(start, length)


@dataclass(frozen=True, slots=True)
class Replay:
    """Figures that the allocator would have reported."""

    allocated_bytes: int
    """Peak of `memory_allocated`: blocks, with the rests that were too small to split off."""
    reserved_bytes: int


def replay(sizes: Sequence[int], events: Iterable[int]) -> Replay:
    """Replay allocations and frees, in order.

    Args:
        sizes: Bytes of each block, rounded to the allocator's.
        events: A block's number where it is allocated, `~number` where it is freed.
    """
    large, small = _Pool(small=False), _Pool(small=True)
    units = [max(-(-size // BLOCK), 1) for size in sizes]
    pools = [small if size <= SMALL_SIZE // BLOCK else large for size in units]
    blocks: dict[int, tuple[int, int]] = {}
    allocated = peak = 0
    for event in events:
        if event >= 0:
            block = blocks[event] = pools[event].allocate(units[event])
            allocated += block[1]
            if allocated > peak:
                peak = allocated
        else:
            block = blocks.pop(~event)
            allocated -= block[1]
            pools[~event].free(*block)
    return Replay(peak * BLOCK, (large.reserved + small.reserved) * BLOCK)
