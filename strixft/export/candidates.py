"""Which base the adapter is merged into, chosen by what each merge does on held-out rows.

The adapter was trained beside a quantised base. Merged into that base, dequantised, the model is
the trained function but for rounding; merged into the original weights it is another function,
which may know the data better or worse. Both are compared with the trained function from disk.

Shapes: T tokens, C channels, K positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from strixft.data import collate, on_device
from strixft.export.layerwise import Checkpoint, Streamed, merged_function, trained_function
from strixft.export.merge import read_updates
from strixft.guard import device_type, find_host
from strixft.methods import METHODS
from strixft.model import base_of, load_config, native_dtype
from strixft.progress import progress_bar
from strixft.recipe import Recipe
from strixft.step.loss import chunk_rows

ROWS = 32
"""Most rows that are compared."""
TOKENS = 8192
"""Most tokens of all rows: their hidden states take 0.25 GiB a function in a 70B in float32."""
SAME_KL = 1e-3
"""Nats a token. Where the candidates' divergences are nearer than this, perplexity decides."""
TRAINED = "trained"
CANDIDATES = ("original", "dequantised")
"""Names of the bases that the adapter can be merged into."""

Row = Mapping[str, Any]


def compared_rows(rows: Sequence[Row]) -> list[Row]:
    """The first rows that fit together: at least one, at most `ROWS` and `TOKENS` of them."""
    found: list[Row] = []
    room = TOKENS
    for row in rows:
        if len(found) < ROWS and (not found or len(row["input_ids"]) <= room):
            found.append(row)
            room -= len(row["input_ids"])
    return found


def _functions(recipe: Recipe, base_folder: Path, adapter: Path) -> dict[str, Streamed]:
    device, config = device_type(), load_config(recipe)
    dtype = native_dtype(device, bfloat16=find_host(recipe.memory.host).bfloat16)
    base = Checkpoint(base_folder, device)
    updates = {name: update.to(device) for name, update in read_updates(adapter).items()}
    kept = {"original": "native", "dequantised": METHODS[recipe.method].base}
    trained = trained_function(recipe, config, base, Checkpoint(adapter, device), dtype)
    merged = {
        name: merged_function(config, base, updates, kept[name], dtype) for name in CANDIDATES
    }
    return {TRAINED: trained, **merged}


def last_states(
    functions: Mapping[str, Streamed], rows: Sequence[Tensor]
) -> dict[str, list[Tensor]]:
    """Hidden states of each row after the last layer, (1, T, C), of each function.

    Args:
        functions: By name; they share what comes before the first layer.
        rows: Token ids, (1, T) each.
    """
    first = next(iter(functions.values()))
    hidden, calls = first.begin(rows)
    states = dict.fromkeys(functions, hidden)
    for index in progress_bar(range(len(first.layers)), unit="layer", desc="merge"):
        for name, function in functions.items():
            states[name] = function.layer(index, states[name], calls)
    return states


def _sums(logits: Mapping[str, Tensor], labels: Tensor) -> dict[str, tuple[float, float]]:
    """Of each function: divergence of the trained one from it, and loss; sums over positions."""
    scores = {name: found.log_softmax(-1) for name, found in logits.items()}  # (K, V)
    trained = scores[TRAINED]
    places = labels.unsqueeze(-1)
    return {
        name: (
            float((trained.exp() * (trained - found)).sum()),
            float(-found.gather(-1, places).sum()),
        )
        for name, found in scores.items()
    }


def _chunks(batch: Mapping[str, Tensor], vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions and labels of a row, so many at once that their logits are small, (K,) each."""
    size = chunk_rows(len(batch["labels"]), vocabulary)
    yield from zip(batch["positions"].split(size), batch["labels"].split(size), strict=True)


def _measured(functions: Mapping[str, Streamed], rows: Sequence[Row]) -> dict[str, Any]:
    device = device_type()
    batches = [on_device(collate([row]), device) for row in rows]
    states = last_states(functions, [batch["input_ids"] for batch in batches])
    vocabulary = base_of(functions[TRAINED].model).config.get_text_config().vocab_size
    totals = dict.fromkeys(functions, (0.0, 0.0))
    with functions[CANDIDATES[0]].ending() as head:
        for number, batch in enumerate(progress_bar(batches, unit="row", desc="head")):
            for positions, labels in _chunks(batch, vocabulary):
                logits = {name: head(states[name][number], positions) for name in functions}
                for name, (kl, loss) in _sums(logits, labels).items():
                    totals[name] = (totals[name][0] + kl, totals[name][1] + loss)
    tokens = sum(len(batch["labels"]) for batch in batches)
    means = {name: (kl / tokens, math.exp(loss / tokens)) for name, (kl, loss) in totals.items()}
    return {
        "rows": len(rows),
        "tokens": tokens,
        "trained_perplexity": means[TRAINED][1],
        "candidates": {n: {"kl": means[n][0], "perplexity": means[n][1]} for n in CANDIDATES},
    }


def chosen(candidates: Mapping[str, Mapping[str, float]]) -> str:
    """The candidate that is written.

    The one that diverges less from the trained function; where both are as near to it, the one
    that knows the held-out rows better, and of equals the original weights.

    >>> near, far = {"kl": 0.0, "perplexity": 3.0}, {"kl": 0.02, "perplexity": 2.9}
    >>> chosen({"original": far, "dequantised": near})
    'dequantised'
    >>> chosen({"original": {**far, "kl": 0.0005}, "dequantised": near})
    'original'

    Args:
        candidates: `kl` and `perplexity` of each.
    """
    divergences = [candidates[name]["kl"] for name in CANDIDATES]
    near = max(divergences) - min(divergences) < SAME_KL
    return min(CANDIDATES, key=lambda name: candidates[name]["perplexity" if near else "kl"])


def compare_merges(
    recipe: Recipe, base_folder: Path, adapter: Path, rows: Sequence[Row]
) -> dict[str, Any]:
    """Both merges of a quantised run beside the trained function.

    Args:
        recipe: Of the run.
        base_folder: The original weights.
        adapter: Folder of the adapter.
        rows: Held-out token rows.

    Returns:
        `rows`, `tokens`, `trained_perplexity`; `candidates`, each with `kl` (nats a token, of the
        trained function from it) and `perplexity`; `chosen`.

    Raises:
        StageError: The base lacks a tensor of the model.
    """
    figures = _measured(_functions(recipe, base_folder, adapter), compared_rows(rows))
    return {**figures, "chosen": chosen(figures["candidates"])}
