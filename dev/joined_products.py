"""Sums of a layer's products, added up and as one product of joined matrices, turn by turn.

    python dev/joined_products.py [TOKENS] [SIDE]

TOKENS is 32768 and SIDE 4096 if not given: a layer of Llama 3.1 8B; others keep its proportions.
What `docs/performance.md` has of it was measured once each, before this took turns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from strixft.bench.timing import direct_seconds, take_turns
from strixft.guard.host import device_type

RANK, ROOM, CALLS, TURNS = 16, 64, 3, 9
PRODUCTS = {
    "q": ([1.0], 1.0),
    "gate": ([1.0], 3.5),
    "down": ([3.5], 1.0),
    "gradient of o's input": ([1.0], 1.0),
    "gradient of q's, k's and v's input": ([1.0, 0.25, 0.25], 1.0),
    "gradient of gate's and up's input": ([3.5, 3.5], 1.0),
    "gradient of down's input": ([1.0], 3.5),
}
"""Depths of the products that are added up, and columns of the sum, as multiples of SIDE."""


def options(tokens: int, depths: list[int], columns: int) -> dict[str, Callable[[], Any]]:
    """A sum, and the same as one; what a kernel writes beside it is there, thin matrices are not.

    Args:
        tokens: Rows.
        depths: Of the products.
        columns: Of the sum.
    """
    device, ranks = device_type(), RANK * len(depths)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    random = partial(torch.randn, device=device, dtype=dtype)
    lefts, rights = ([random(n, depth) for depth in depths] for n in (tokens, columns))
    thin, factors = random(tokens, ranks), random(columns, ranks)
    room = [random(n, ROOM) for n in (tokens, columns)]
    width = sum(depths) + ranks
    left, right = (torch.cat([*m, r], 1) for m, r in zip((lefts, rights), room, strict=True))
    total = random(tokens, columns)

    def added() -> None:
        torch.mm(thin, factors.T, out=total)
        for x, w in zip(lefts, rights, strict=True):
            total.addmm_(x, w.T)

    def joined() -> None:
        for whole, part in ((left, thin), (right, factors)):
            whole[:, width - ranks : width].copy_(part)
        torch.mm(left[:, :width], right[:, :width].T, out=total)

    return {"added": added, "joined": joined}


def milliseconds(works: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median of each way."""
    device = device_type()
    measures = {name: partial(direct_seconds, work, CALLS, device) for name, work in works.items()}
    return {name: found.median * 1e3 for name, found in take_turns(measures, TURNS).items()}


def main(tokens: int = 32_768, side: int = 4096) -> None:
    """Print a table."""
    print("| a layer of so many tokens, ms | added up | as one | gain |\n| --- | --- | --- | --- |")
    for name, (depths, columns) in PRODUCTS.items():
        works = options(tokens, [round(side * depth) for depth in depths], round(side * columns))
        ms = milliseconds(works)
        gain = ms["added"] / ms["joined"] - 1
        print(f"| {name} | {ms['added']:.3f} | {ms['joined']:.3f} | {gain:+.1%} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
