"""Where the device waits for Python while `strixft train` runs.

    python dev/waits.py RECIPE [UPDATE]      # two updates after the fourth

The recipe's run is prepared and planned, and its training has not begun; it is trained to its end.
Prints the longest waits between two kernels, and what took the time of each. A profiler makes
Python slower, so waits are shorter without it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch.autograd import DeviceType
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

from strixft import open_run, train_recipe
from strixft.guard.host import device_type

UPDATES, SHOWN, ACTIONS = 2, 12, 6

Span = tuple[float, float, str]
"""Begin and end in microseconds, and what it is."""


def waits(kernels: Iterable[Span]) -> list[Span]:
    """Stretches in which no kernel runs, longest first, with the kernel that ended each."""
    ordered = sorted(kernels)
    busy_until = itertools.accumulate((end for _, end, _ in ordered), max)
    found = [
        (busy, begin, name)
        for busy, (begin, _, name) in zip(busy_until, ordered[1:], strict=False)
        if begin > busy
    ]
    return sorted(found, key=lambda span: span[0] - span[1])


def within(actions: Iterable[Span], begin: float, end: float) -> list[Span]:
    """The part of each action that lies in a stretch, longest first."""
    cut = ((max(a, begin), min(b, end), name) for a, b, name in actions if a < end and b > begin)
    return sorted(cut, key=lambda span: span[0] - span[1])


def spans(profiled: profile, device: Any) -> list[Span]:
    """What a device did."""
    events = (event for event in profiled.events() if event.device_type == device)
    return [(event.time_range.start, event.time_range.end, event.name) for event in events]


def report(kernels: Sequence[Span], actions: Sequence[Span]) -> None:
    """Print the longest waits."""
    found = waits(kernels)
    whole = max(end for _, end, _ in kernels) - min(begin for begin, _, _ in kernels)
    idle = sum(end - begin for begin, end, _ in found)
    print(f"{UPDATES} updates: {whole / 1e3:.1f} ms, the device waits {idle / 1e3:.2f} ms of them")
    for begin, end, kernel in found[:SHOWN]:
        print(f"{(end - begin) / 1e3:8.2f} ms before {kernel[:70]}")
        for a, b, name in within(actions, begin, end)[:ACTIONS]:
            print(f"{(a - begin) / 1e3:16.2f} to {(b - begin) / 1e3:.2f}  {name[:70]}")


class Profiled:
    """Profiles two updates of whatever is trained.

    Args:
        first: They come after so many.
    """

    def __init__(self, first: int) -> None:
        self._first, self._done = first, 0
        self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        """The optimiser has made a step."""
        self._done += 1
        if self._done == self._first:
            self._profile.start()
        if self._done == self._first + UPDATES:
            self._profile.stop()
            report(spans(self._profile, DeviceType.CUDA), spans(self._profile, DeviceType.CPU))


def main(recipe: str, first: str = "4") -> None:
    """Train, and print where the device waits."""
    if device_type() != "cuda":
        sys.exit("only a GPU waits for Python, and torch sees none here: run it where it does")
    register_optimizer_step_post_hook(Profiled(int(first)))
    train_recipe(open_run(recipe))


if __name__ == "__main__":
    main(*sys.argv[1:])
