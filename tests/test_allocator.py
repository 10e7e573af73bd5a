"""The replay follows the rules of torch's caching allocator."""

import pytest

from strixft.plan.allocator import LARGE_SEGMENT, SMALL_SEGMENT, replay
from strixft.plan.trace import Place, Storage, Trace
from strixft.units import MIB

HERE = Place(0, "load")


def trace(*steps: int | tuple[str, int]) -> Trace:
    """Allocations by size, frees as ("free", number of the allocation)."""
    found = Trace(0)
    for step in steps:
        if isinstance(step, tuple):
            found.events.append((HERE, step[1], False))
        else:
            found.events.append((HERE, len(found.storages), True))
            found.storages.append(Storage(step, "activations", HERE))
    return found


@pytest.mark.parametrize(
    ("size", "reserved"),
    [
        (512, SMALL_SEGMENT),
        (MIB, SMALL_SEGMENT),
        (MIB + 512, LARGE_SEGMENT),
        (10 * MIB - 512, LARGE_SEGMENT),
        (10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB),
    ],
)
def test_a_segment_is_as_large_as_torch_makes_it(size: int, reserved: int) -> None:
    assert replay(trace(size)).reserved_bytes == reserved


def test_a_freed_block_is_used_again() -> None:
    found = replay(trace(30 * MIB, ("free", 0), 30 * MIB))
    assert (found.allocated_bytes, found.reserved_bytes) == (30 * MIB, 30 * MIB)


def test_a_rest_of_more_than_a_mebibyte_is_split_off() -> None:
    found = replay(trace(30 * MIB, ("free", 0), 20 * MIB, 10 * MIB))
    assert found.reserved_bytes == 30 * MIB


def test_a_small_rest_stays_with_its_block_and_counts_as_allocated() -> None:
    found = replay(trace(30 * MIB, ("free", 0), 30 * MIB - 512 * 1024))
    assert found.allocated_bytes == 30 * MIB


def test_the_best_fit_is_taken() -> None:
    found = replay(trace(40 * MIB, 20 * MIB, ("free", 0), ("free", 1), 20 * MIB, 40 * MIB))
    assert found.reserved_bytes == 60 * MIB


def test_neighbours_merge_when_both_are_free() -> None:
    found = replay(
        trace(30 * MIB, ("free", 0), 20 * MIB, 10 * MIB, ("free", 1), ("free", 2), 30 * MIB)
    )
    assert found.reserved_bytes == 30 * MIB


def test_fragments_cost_memory_and_expandable_segments_save_it() -> None:
    events = trace(20 * MIB, 20 * MIB, ("free", 0), ("free", 1), 40 * MIB)
    assert replay(events).reserved_bytes == 80 * MIB
    assert replay(events, "expandable").reserved_bytes == 40 * MIB


def test_expandable_segments_grow_by_pages() -> None:
    assert replay(trace(21 * MIB), "expandable").reserved_bytes == 40 * MIB
    assert replay(trace(512), "expandable").reserved_bytes == SMALL_SEGMENT
