"""Advice after a run ended because of memory or a number that is not finite."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from strixft.catalog.methods import METHODS
from strixft.recipe.schema import Recipe
from strixft.run.open import begin_again

_ATTENTION_SWITCH = "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"


def _less_memory(recipe: Recipe, plan: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield a part of the plan's peak, and the key and value of a setting that reduces it."""
    choice, method = plan["choice"], METHODS[recipe.method]
    if choice["micro_batch_rows"] > 1:
        yield "activations", "train.micro_batch", 1
    if choice["recomputed_layers"] < choice["num_layers"]:
        yield "activations", "train.recompute", "all"
    if method.base != "nf4":
        yield "weights", "method", "qlora"
    if method.adapter == "none":
        yield "optimizer", "method", "lora"
    yield "activations", "dataset.max_length", max(8, choice["max_length"] // 2)
    if method.adapter != "none" and recipe.lora.experts == "all":
        yield "optimizer", "lora.experts", "shared"
    if method.adapter != "none" and recipe.lora.r > 4:
        yield "adapter", "lora.r", recipe.lora.r // 4


def less_memory(recipe: Recipe, plan: Mapping[str, Any]) -> str:
    """Return the two settings that help most, judged by the parts of the plan's peak.

    Args:
        recipe: The recipe that ran.
        plan: The plan's figures.
    """
    found = list(_less_memory(recipe, plan))
    found.sort(key=lambda row: -plan["parts"].get(row[0], 0))
    settings = [f"--set {key}={value} {begin_again([key])}" for _, key, value in found[:2]]
    return f"close other programs, or add {' or '.join(settings)}"


def finite_again(
    recipe: Recipe, update: int, *, device: str, is_float16: bool, model_type: str
) -> str:
    """Return remedies for a loss or gradient that is not finite, by known causes.

    Args:
        recipe: The recipe that ran.
        update: Number of the update; in the first one the weights are the base's own.
        device: `cpu` or `cuda`.
        is_float16: The base computes in float16.
        model_type: Type in the model's `config.json`.
    """
    tries = ["look at the rows above"]
    if device == "cuda":
        known = "ROCm/aotriton#179: head size 72"
        if model_type.startswith("gemma"):
            known += "; unslothai/unsloth#3385: Gemma"
        tries.append(f"another attention path: {_ATTENTION_SWITCH}=0 before the command ({known})")
    if is_float16:
        tries.append("float16 overflows above 65504: a host with bfloat16")
    if update == 1:
        tries.append("another base: no weight had been changed yet")
    else:
        rate, key = recipe.train.learning_rate / 10, "train.learning_rate"
        tries.append(f"a lower rate: add --set {key}={rate:g} {begin_again([key])}")
    return "\n     or ".join(tries)


BEFORE = 20
"""Updates whose losses are the usual ones for the next."""

LEAST_BEFORE = 5

SPIKE_DEVIATIONS = 6.0
"""Height of a spike above the median of the usual losses, in median deviations."""

LEAST_RISE = 0.1
"""Smallest rise that counts, relative to the median."""


def loss_spikes(losses: Sequence[float]) -> list[int]:
    """Return the updates, counted from 1, whose loss is far above those before.

    >>> loss_spikes([2.0, 1.9, 1.8, 1.8, 1.7, 1.7, 6.0, 1.6])
    [7]
    """
    found = []
    for index in range(LEAST_BEFORE, len(losses)):
        before = losses[max(0, index - BEFORE) : index]
        usual = statistics.median(before)
        spread = statistics.median(abs(loss - usual) for loss in before)
        if losses[index] - usual > max(SPIKE_DEVIATIONS * spread, LEAST_RISE * usual):
            found.append(index + 1)
    return found
