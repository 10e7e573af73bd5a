"""What to type after a run ended for memory, or for a number that is none."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from strixft.catalog.methods import METHODS
from strixft.recipe.schema import Recipe
from strixft.run.open import begin_again

_ATTENTION_SWITCH = "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"


def _less_memory(recipe: Recipe, plan: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Part of the peak that a setting lessens, the setting's key, and its value."""
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
    if method.adapter != "none" and recipe.lora.r > 4:
        yield "adapter", "lora.r", recipe.lora.r // 4


def less_memory(recipe: Recipe, plan: Mapping[str, Any]) -> str:
    """The two settings that help most, judged by the parts of the plan's peak.

    Args:
        recipe: What ran.
        plan: The plan's figures.
    """
    found = list(_less_memory(recipe, plan))
    found.sort(key=lambda row: -plan["parts"].get(row[0], 0))
    settings = [f"--set {key}={value} {begin_again([key])}" for _, key, value in found[:2]]
    return f"close other programs, or add {' or '.join(settings)}"


def finite_again(
    recipe: Recipe, update: int, *, device: str, is_float16: bool, model_type: str
) -> str:
    """What to try when a loss or a gradient is no finite number, by known causes.

    Args:
        recipe: What ran.
        update: Which update; before the first one the weights are the base's own.
        device: `cpu` or `cuda`.
        is_float16: The base computes in float16.
        model_type: As in the model's `config.json`.
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
        tries.append("the base itself: no weight had been changed yet")
    else:
        rate = recipe.train.learning_rate / 10
        key = "train.learning_rate"
        tries.append(f"a lower rate: add --set {key}={rate:g} {begin_again([key])}")
    return "\n     or ".join(tries)


BEFORE = 20
"""Updates that say what is usual."""

LEAST = 5

TIMES = 6.0
"""Median deviations above the median of what came before."""

LEAST_RISE = 0.1
"""A smaller rise is none, in shares of the median."""


def loss_spikes(losses: Sequence[float]) -> list[int]:
    """Updates, counted from 1, whose loss stands far above those before.

    >>> loss_spikes([2.0, 1.9, 1.8, 1.8, 1.7, 1.7, 6.0, 1.6])
    [7]
    """
    found = []
    for index in range(LEAST, len(losses)):
        before = losses[max(0, index - BEFORE) : index]
        usual = statistics.median(before)
        spread = statistics.median(abs(loss - usual) for loss in before)
        rise = losses[index] - usual
        if rise > TIMES * spread and rise > LEAST_RISE * usual:
            found.append(index + 1)
    return found
