"""The child of `strixft.doctor.probe`: uses torch for real, one step after the other.

Run as `python -m strixft.doctor.probe_child FILE`; writes JSON lines to FILE, see `strixft.child`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strixft.probe.weights import round_trip
from strixft.support.child import Figures, do_steps

ATTENTION_ERROR = {"bfloat16": 0.05, "float16": 0.02, "float32": 1e-3}
"""Largest error allowed, relative to the largest value of the float32 reference."""

HEAD_ERROR = 0.05

HEAD_SIZES = (64, 72, 80, 96, 128, 256)
"""72 is where AOTriton gives NaN (ROCm/aotriton#179); 256 is Gemma's."""


def device() -> torch.device:
    """The GPU if torch has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype() -> torch.dtype:
    """What training computes in on this device."""
    if device().type == "cpu":
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def _wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def _gpu() -> Figures:
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "arch": str(getattr(properties, "gcnArchName", "")).partition(":")[0],
        "total_bytes": properties.total_memory,
        "devices": torch.cuda.device_count(),
    }


def describe_build() -> Figures:
    """Version, what the build is for, and what it sees."""
    figures: Figures = {
        "version": torch.__version__,
        "hip": torch.version.hip,
        "cuda": torch.version.cuda,
        "arch_list": torch.cuda.get_arch_list(),
        "device": "cpu",
        "devices": 0,
    }
    if device().type == "cuda":
        figures |= _gpu()
        torch.ones(8, device="cuda").sum().item()  # the first kernel, and the first wait for one
    return figures


def relative_error(found: Tensor, reference: Tensor) -> float:
    """Length of the difference ÷ length of the reference."""
    difference = found.float() - reference.float()
    return float(difference.norm() / reference.float().norm())


def round_trip_nf4() -> Figures:
    """Weights in 4 bits, there and back."""
    return round_trip(device().type, str(compute_dtype()).removeprefix("torch."))


def _attention_inputs(head_size: int) -> list[Tensor]:
    """Queries, keys, values: (B, H, T, D), four heads of queries to one of keys."""
    torch.manual_seed(0)
    shapes = ((1, 4, 128, head_size), (1, 1, 128, head_size), (1, 1, 128, head_size))
    return [torch.randn(shape) for shape in shapes]


def _plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax written out: the reference that no kernel can share a fault with."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5  # (B, H, T, T)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    weights: Tensor = scores.masked_fill(future, float("-inf")).softmax(-1)
    return weights @ value


def _fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )


def _with_gradients(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]
) -> list[Tensor]:
    """The result, and the gradients of the inputs for the sum of its squares."""
    query, key, value = (tensor.detach().clone().requires_grad_() for tensor in inputs)
    result = attend(query, key, value)
    result.float().square().sum().backward()
    return [result.detach(), *(leaf.grad for leaf in (query, key, value) if leaf.grad is not None)]


def largest_error(found: list[Tensor], reference: list[Tensor]) -> float:
    """Largest difference of any tensor, relative to the largest value of its reference."""
    errors = [
        float((a.float().cpu() - b.float().cpu()).abs().max() / b.float().abs().max())
        for a, b in zip(found, reference, strict=True)
    ]
    return max(errors, key=lambda error: float("inf") if error != error else error)


def _allowed() -> float:
    return ATTENTION_ERROR[str(compute_dtype()).removeprefix("torch.")]


def check_attention() -> Figures:
    """SDPA forward and backward against plain float32, for the head sizes that models have."""
    errors: dict[int, float] = {}
    milliseconds: dict[int, float] = {}
    for size in HEAD_SIZES:
        inputs = [tensor.to(compute_dtype()) for tensor in _attention_inputs(size)]
        reference = _with_gradients(_plain_attention, [tensor.float() for tensor in inputs])
        on_device = [tensor.to(device()) for tensor in inputs]
        _with_gradients(_fused_attention, on_device)  # the first call may compile
        _wait()
        began = time.perf_counter()
        found = _with_gradients(_fused_attention, on_device)
        _wait()
        milliseconds[size] = round((time.perf_counter() - began) * 1e3, 2)
        errors[size] = largest_error(found, reference)
    wrong = [size for size, error in errors.items() if not error < _allowed()]
    figures: Figures = {"dtype": str(compute_dtype()), "errors": errors, "ms": milliseconds}
    if wrong:
        figures["problem"] = f"wrong or no numbers at head size {', '.join(map(str, wrong))}"
    return figures


def check_flex() -> Figures:
    """Flex attention, compiled, forward and backward; it has no fast path on a CPU."""
    if device().type == "cpu":
        return {"skipped": "flex attention is compiled for a GPU only"}
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    mask = create_block_mask(causal, None, None, 128, 128, device="cuda")
    compiled: Any = torch.compile(flex_attention)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result: Tensor = compiled(query, key, value, block_mask=mask, enable_gqa=True)
        return result

    inputs = [tensor.to(compute_dtype()) for tensor in _attention_inputs(64)]
    found = _with_gradients(attend, [tensor.to(device()) for tensor in inputs])
    error = largest_error(found, _with_gradients(_plain_attention, [t.float() for t in inputs]))
    figures: Figures = {"error": error}
    if not error < _allowed():
        figures["problem"] = f"error {error:.3g} of the largest value"
    return figures


def check_head() -> Figures:
    """TRL's fused head, forward and backward, against plain cross-entropy."""
    from trl.kernels import ChunkedLogProbFunction

    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 128), torch.randn(1000, 128) * 0.1  # (N, C), (V, C)
    targets = torch.randint(0, 1000, (64,))
    plain = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    torch.nn.functional.cross_entropy(plain[0] @ plain[1].T, targets, reduction="sum").backward()
    fused = [t.to(device(), compute_dtype()).requires_grad_() for t in (hidden, weight)]
    logprobs = ChunkedLogProbFunction.apply(*fused, None, targets.to(device()), 1.0, 512)[0]
    (-logprobs.sum()).backward()
    pairs = zip(fused, plain, strict=True)
    error = max(relative_error(a.grad.cpu(), b.grad) for a, b in pairs)  # type: ignore[union-attr,arg-type]
    figures: Figures = {"relative_error": error}
    if not error < HEAD_ERROR:
        figures["problem"] = f"gradients are off by {error:.3g} of their length"
    return figures


def _tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device(), compute_dtype())


def train_step() -> Figures:
    """Three updates of a LoRA on a model of two layers, by the product's own training step."""
    from strixft.catalog.methods import METHODS
    from strixft.data.batches import collate, on_device
    from strixft.model.adapter import attach_adapter
    from strixft.recipe.schema import Lora, Train
    from strixft.step.update import TrainingStep

    model = attach_adapter(_tiny_model(), METHODS["lora"], Lora(r=4, alpha=8))
    step = TrainingStep(model, Train(learning_rate=0.01))
    rows = [{"input_ids": list(range(1, 65)), "trained": [True] * 64} for _ in range(2)]
    batch = on_device(collate(rows), device())
    losses = [float(step.update([batch])) for _ in range(3)]
    figures: Figures = {"losses": losses}
    if not losses[-1] < losses[0]:
        figures["problem"] = f"the loss did not fall: {losses}"
    return figures


WORK: Mapping[str, Callable[[], Figures]] = {
    "import": describe_build,
    "nf4": round_trip_nf4,
    "attention": check_attention,
    "head": check_head,
    "step": train_step,
    "flex": check_flex,
}


def main(output: Path) -> None:
    """Do every step."""
    if device().type == "cpu":
        torch.set_num_threads(1)  # threads that wait for each other cost more than they bring here
    do_steps(output, WORK)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
