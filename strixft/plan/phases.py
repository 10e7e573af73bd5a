"""Peaks of the phases of a run other than training."""

from __future__ import annotations

from typing import Any

from strixft.plan.dry_run import DryRun

Phase = dict[str, int | None]


def kv_cache_bytes(config: Any, rows: int, tokens: int, element_bytes: int = 2) -> int:
    """Keys and values of every layer, as if each attended to all tokens."""
    text = config.get_text_config()
    heads = text.num_key_value_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * size * rows * tokens * element_bytes)


def largest_tensor_bytes(config: Any, element_bytes: int = 2) -> int:
    """The largest matrix of the model before quantisation: it is in flight while loading."""
    text = config.get_text_config()
    widest = max(text.vocab_size, text.intermediate_size)
    return int(widest * text.hidden_size * element_bytes)


def phases(run: DryRun, config: Any, max_length: int, answered_at_once: int) -> dict[str, Phase]:
    """Device and host peak of each phase; None where it is not known.

    Args:
        run: The dry run of the training step.
        config: The model's configuration.
        max_length: Longest row in tokens.
        answered_at_once: Rows of a batch of generation.
    """
    fixed = run.parts["weights"] + run.parts["adapter"] + run.parts["workspace"]
    in_flight = largest_tensor_bytes(config)
    cache = kv_cache_bytes(config, answered_at_once, max_length)
    return {
        "load": {"device_bytes": fixed + in_flight, "host_bytes": 2 * in_flight},
        "train": {"device_bytes": run.reserved_bytes, "host_bytes": None},
        "evaluate": {"device_bytes": fixed + in_flight, "host_bytes": None},
        "generate": {"device_bytes": fixed + cache, "host_bytes": None},
        "merge": {"device_bytes": None, "host_bytes": None},
        "export": {"device_bytes": None, "host_bytes": None},
    }
