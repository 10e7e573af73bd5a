"""The replay follows the rules of torch's caching allocator."""

from itertools import count

import pytest

from strixft.plan.allocator import LARGE_SEGMENT, SMALL_SEGMENT, Replay, replay
from strixft.support.units import MIB

Step = int | tuple[str, int]


def replayed(*steps: Step) -> Replay:
    """Replay allocations by size, and frees as ("free", number of the allocation)."""
    sizes = [step for step in steps if isinstance(step, int)]
    numbers = count()
    events = [~step[1] if isinstance(step, tuple) else next(numbers) for step in steps]
    return replay(sizes, events)


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
    assert replayed(size).reserved_bytes == reserved


def test_a_freed_block_is_used_again() -> None:
    found = replayed(30 * MIB, ("free", 0), 30 * MIB)
    assert (found.allocated_bytes, found.reserved_bytes) == (30 * MIB, 30 * MIB)


def test_a_rest_of_more_than_a_mebibyte_is_split_off() -> None:
    found = replayed(30 * MIB, ("free", 0), 20 * MIB, 10 * MIB)
    assert found.reserved_bytes == 30 * MIB


def test_a_small_rest_stays_with_its_block_and_counts_as_allocated() -> None:
    found = replayed(30 * MIB, ("free", 0), 30 * MIB - 512 * 1024)
    assert found.allocated_bytes == 30 * MIB


def test_the_best_fit_is_taken() -> None:
    found = replayed(40 * MIB, 20 * MIB, ("free", 0), ("free", 1), 20 * MIB, 40 * MIB)
    assert found.reserved_bytes == 60 * MIB


def test_neighbours_merge_when_both_are_free() -> None:
    found = replayed(30 * MIB, ("free", 0), 20 * MIB, 10 * MIB, ("free", 1), ("free", 2), 30 * MIB)
    assert found.reserved_bytes == 30 * MIB


def test_segments_do_not_merge() -> None:
    steps: list[Step] = [20 * MIB, 20 * MIB, ("free", 0), ("free", 1), 40 * MIB]
    assert replayed(*steps).reserved_bytes == 80 * MIB
