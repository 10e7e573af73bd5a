"""Checks on a few rows that the merged model is the trained one, in float32 arithmetic.

Two correct models in bfloat16 differ more by the rounding of their activations than by that of
their weights. In float32 only the rounding of the weights is left. Each weight is widened where it
is used, so that no second copy is kept.

Shapes: K positions, V vocabulary.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from strixft.attention.backends import BACKENDS
from strixft.attention.interface import call_ours, use_backend
from strixft.catalog.methods import METHODS
from strixft.evaluate.variants import load_variant
from strixft.guard.host import budget_for, device_type, find_host, training_dtype
from strixft.model.adapter import base_of
from strixft.model.architecture import auto_class
from strixft.model.experts import call_routed
from strixft.model.files import shard_paths
from strixft.model.source import load_config
from strixft.model.stream import Shard
from strixft.recipe.schema import Recipe
from strixft.support.private_torch import tree_leaves, tree_map

ROWS = 4
"""Rows that are compared."""

TOKENS = 1024
"""Most tokens of a row; their logits of the largest vocabulary take 1 GiB."""

POSITIONS = 256
"""Most positions of a row that are compared, from its end."""

MOST_DIFFERENCE = 5e-5
"""Largest difference of two logits in float32, as a share of the largest logit. Right merges of
random models differ by up to 1.4e-5 (`make sweep`: gemma4_text, qwen3_5)."""

MOST_KL = 1e-3
"""Largest mean KL(trained ‖ merged) where weights are rounded, in nats a token."""

LEAST_TOP1 = 0.99
"""Smallest share of positions at which both choose the same token."""

LEAST_LEARNED_KL = 1e-6
"""Nats a token below which training has changed too little for its absence to show."""

WHOLE = {"F32", "I64"}
"""Types in files whose weights no arithmetic rounds."""

Logits = list[Tensor]
"""(K, V) of each row, float32, on the host."""


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _widen(value: Any) -> Any:
    return value.float() if _is_half(value) else value


class Float32(TorchFunctionMode):
    """Run a forward pass in float32, whatever the types of the weights.

    Looked-up embeddings become float32, and so does each 16-bit value that meets float32.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch with widened arguments, unless it writes into one of them."""
        kwargs = kwargs or {}
        if func is nn.functional.embedding:
            return _widen(func(*args, **kwargs))
        values = tree_leaves((args, kwargs))
        is_wide = any(isinstance(v, Tensor) and v.dtype is torch.float32 for v in values)
        if is_wide and any(map(_is_half, values)) and not func.__name__.endswith("_"):
            args, kwargs = tree_map(_widen, (args, kwargs))
        return func(*args, **kwargs)


def in_float32(model: nn.Module) -> Float32:
    """Return a context in which a model computes in float32.

    From now on its 4-bit layers multiply in float32, and its experts in the type of their rows.
    """
    call_routed(base_of(model))
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.compute_dtype = torch.float32
    return Float32()


@torch.no_grad()
def _logits(model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> Logits:
    """Compute logits in float32 without flash kernels, so that only weights are rounded."""
    found = []
    use_backend(base_of(model), BACKENDS["eager-rows"])
    with in_float32(model):
        for row in rows:
            ids = torch.tensor([list(row["input_ids"][:TOKENS])], device=device_type())
            scores: Tensor = model(input_ids=ids, use_cache=False).logits[0, -POSITIONS:]
            found.append(scores.float().cpu())
    return found


def _divergence(left: Logits, right: Logits) -> float:
    """Return the mean KL(left ‖ right) of all positions, in nats."""
    total = 0.0
    for a, b in zip(left, right, strict=True):
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return max(0.0, total / sum(map(len, left)))


def compare(trained: Logits, merged: Logits, base: Logits | None) -> dict[str, Any]:
    """Return the distance of the merged model from the trained one.

    Args:
        trained: Logits of base and adapter, as they were trained.
        merged: Logits of the merged model.
        base: Logits of the base alone.

    Returns:
        `max_difference`, of logits, as a share of the largest one; `kl` of the trained function
        from the merged one and `learned_kl` from the base, nats a token; `top1`, the share of
        positions with the same choice.
    """
    pairs = list(zip(trained, merged, strict=True))
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    tokens, largest = sum(map(len, trained)), max(float(a.abs().max()) for a in trained)
    return {
        "rows": len(trained),
        "tokens": tokens,
        "max_difference": max(float((a - b).abs().max()) for a, b in pairs) / largest,
        "kl": _divergence(trained, merged),
        "learned_kl": None if base is None else _divergence(trained, base),
        "top1": same / tokens,
    }


def faults(found: Mapping[str, Any], *, exact: bool) -> list[str]:
    """Return the violated bounds in words.

    Args:
        found: Result of `compare`.
        exact: True if no weight was rounded.
    """
    if exact:
        far = found["max_difference"] > MOST_DIFFERENCE
        by = f"logits differ by {found['max_difference']:.1e} of the largest"
        return [f"{by}, more than {MOST_DIFFERENCE:g} by rounding"] if far else []
    told = [f"KL {found['kl']:.1e} nats (at most {MOST_KL:g})"] if found["kl"] > MOST_KL else []
    if found["top1"] < LEAST_TOP1:
        told.append(f"same next token {found['top1']:.3f} (at least {LEAST_TOP1})")
    learned = found["learned_kl"] or 0.0
    if learned > LEAST_LEARNED_KL and found["kl"] > learned / 2:
        told.append(
            f"KL {found['kl']:.1e} nats, where training moved the base by {learned:.1e}:"
            " rounding has lost what was learned, or it is missing"
        )
    return told


def _stored_types(folder: Path) -> set[str]:
    """Return the names of the types of a model's weights in its files."""
    kinds = set()
    for path in shard_paths(folder):
        with Shard(path) as shard:
            kinds |= {entry.dtype for entry in shard.entries.values()}
    return kinds


def _trained_logits(
    recipe: Recipe, adapter: Path, rows: Sequence[Mapping[str, Any]]
) -> tuple[Logits, Logits | None]:
    """Return the logits of the trained model and of its base."""
    model: Any = load_variant(recipe, adapter, "tuned")
    if METHODS[recipe.method].adapter == "none":
        return _logits(model, rows), None
    if model.get_model_status().merged_adapters:
        model.unmerge_adapter()
    trained = _logits(model, rows)
    with model.disable_adapter():
        return trained, _logits(model, rows)


def load_merged(recipe: Recipe, folder: Path, budget_bytes: int) -> tuple[nn.Module, bool]:
    """Return the merged model, and true if a part of it stays on disk.

    Weights that do not fit stay in their files and are read layer by layer (accelerate's disk
    offload).

    Args:
        recipe: Recipe of the run.
        folder: Folder of the merged model.
        budget_bytes: Memory for it.
    """
    size_bytes = sum(path.stat().st_size for path in shard_paths(folder))
    same = recipe.model_copy(update={"model": str(folder), "method": "lora"})
    whole = _stored_types(folder) <= WHOLE  # 16 bits would round too much
    dtype = torch.float32 if whole else training_dtype()
    fits = size_bytes < budget_bytes * 0.9
    if fits and dtype is training_dtype():
        return load_variant(same, folder, "base"), False
    device = device_type()
    most = {"cpu" if device == "cpu" else 0: int(budget_bytes * 0.7)}
    model: nn.Module = auto_class(load_config(same)).from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": device} if fits else "auto",
        max_memory=None if fits else {"cpu": 0, **most},
        offload_folder=folder / ".offload",
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=recipe.trust_remote_code,
    )
    call_ours(model)
    call_routed(model)
    return model.eval(), not fits


def check_merged(
    recipe: Recipe, adapter: Path, merged: Path, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Compare a merged model with the trained one; only one of them is in memory at a time.

    Args:
        recipe: Recipe of the run.
        adapter: The trained weights.
        merged: Folder of the merged model.
        rows: Token rows; the first `ROWS` are compared.

    Returns:
        The result of `compare`; `faults`, the violated bounds; `exact`, true if no weight was
        rounded; `offloaded`, true if a part of the merged model was read from disk; `seconds`.
    """
    began, chosen = time.monotonic(), list(rows[:ROWS])
    trained, base = _trained_logits(recipe, adapter, chosen)
    gc.collect()
    budget = budget_for(recipe.memory, find_host(recipe.memory.host)).num_bytes
    model, offloaded = load_merged(recipe, merged, budget)
    found = compare(trained, _logits(model, chosen), base)
    del model
    gc.collect()
    is_whole = METHODS[recipe.method].base == "native" and training_dtype() is torch.float32
    exact = is_whole and _stored_types(merged) <= WHOLE
    seconds = round(time.monotonic() - began, 3)
    told = {"exact": exact, "offloaded": offloaded, "seconds": seconds}
    return {**found, **told, "faults": faults(found, exact=exact)}
