"""The child process of the doctor: tries torch, one step after the other.

Run as `python -m strixft.doctor.probe_child FILE`; writes JSON lines to FILE, see
`strixft.support.child`. Attention and 4-bit weights are judged by `strixft.probe`.

Shapes: N tokens, C size of the hidden states, V size of the vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strixft.attention.backends import BACKENDS, Heads
from strixft.model.load import native_dtype
from strixft.probe.attention import measure_backend
from strixft.probe.weights import round_trip
from strixft.support.child import Figures, do_steps

HEAD_SIZES = (64, 72, 80, 96, 128, 256)
"""72 is where AOTriton gives NaN (ROCm/aotriton#179); 256 is Gemma's."""

HEAD_ERROR = 0.05
"""Largest error of the loss's gradients, relative to their length."""


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype() -> torch.dtype:
    """The dtype that training computes in on this device."""
    on_gpu = _device() == "cuda"
    bfloat16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return native_dtype(_device(), bfloat16=bfloat16)


def _dtype_name() -> str:
    return str(_dtype()).removeprefix("torch.")


def describe_build() -> Figures:
    """Return the version of torch, what it was built for, and the devices that it sees."""
    figures: Figures = {
        "version": torch.__version__,
        "hip": torch.version.hip,
        "cuda": torch.version.cuda,
        "arch_list": torch.cuda.get_arch_list(),
        "device": "cpu",
        "devices": 0,
    }
    if _device() == "cuda":
        properties = torch.cuda.get_device_properties(0)
        figures |= {
            "device": properties.name,
            "arch": str(getattr(properties, "gcnArchName", "")).partition(":")[0],
            "total_bytes": properties.total_memory,
            "devices": torch.cuda.device_count(),
        }
        torch.ones(8, device="cuda").sum().item()  # the first kernel, and the first wait for one
    return figures


def _measure_attention(backend: str, head_size: int) -> Figures:
    """Probe a backend: forward and backward, four heads of queries to one of keys."""
    heads = Heads(
        model_type="llama",
        head_size=head_size,
        query_heads=4,
        key_heads=1,
        softcap=None,
        windowed=False,
    )
    row = asdict(BACKENDS[backend])
    return measure_backend(row, asdict(heads), device=_device(), dtype=_dtype_name())


def check_attention() -> Figures:
    """Try SDPA, forward and backward, for the head sizes that models have."""
    found = {size: _measure_attention("sdpa", size) for size in HEAD_SIZES}
    figures: Figures = {
        "dtype": str(_dtype()),
        "errors": {size: row["error"] for size, row in found.items()},
        "ms": {size: row["forward_ms"] + row["backward_ms"] for size, row in found.items()},
    }
    wrong = [str(size) for size, row in found.items() if "problem" in row]
    if wrong:
        figures["problem"] = f"wrong or not finite at head size {', '.join(wrong)}"
    return figures


def check_flex() -> Figures:
    """Try compiled flex attention; it has no gradients on a CPU."""
    if _device() not in BACKENDS["flex"].devices:
        return {"skipped": "flex attention is compiled for a GPU only"}
    return _measure_attention("flex", 64)


def check_head() -> Figures:
    """Compare our chunked head, forward and backward, with plain cross-entropy."""
    from strixft.step.loss import chunked_cross_entropy

    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 128), torch.randn(1000, 128) * 0.1  # (N, C), (V, C)
    targets = torch.randint(0, 1000, (64,))  # (N,)

    def gradients(loss: Callable[..., Tensor], device: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(device, dtype).requires_grad_() for tensor in (hidden, weight)]
        found = torch.autograd.grad(loss(*leaves, targets.to(device)), leaves)
        return [tensor.float().cpu() for tensor in found]

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")

    due = gradients(plain, "cpu", torch.float32)
    found = gradients(chunked_cross_entropy, _device(), _dtype())
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, due, strict=True))
    figures: Figures = {"relative_error": error}
    if not error < HEAD_ERROR:  # NaN is not less
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
    return LlamaForCausalLM(config).to(_device(), _dtype())


def train_step() -> Figures:
    """Update a LoRA on a model of two layers three times, with the product's training step."""
    from strixft.catalog.methods import METHODS
    from strixft.data.batches import collate, on_device
    from strixft.model.adapter import attach_adapter
    from strixft.recipe.schema import Lora, Train
    from strixft.step.update import TrainingStep

    model = attach_adapter(_tiny_model(), METHODS["lora"], Lora(r=4, alpha=8))
    step = TrainingStep(model, Train(learning_rate=0.01))
    rows = [{"input_ids": list(range(1, 65)), "trained": [True] * 64} for _ in range(2)]
    batch = on_device(collate(rows), torch.device(_device()))
    losses = [float(step.update([batch])) for _ in range(3)]
    figures: Figures = {"losses": losses}
    if not losses[-1] < losses[0]:
        figures["problem"] = f"the loss did not fall: {losses}"
    return figures


STEPS: Mapping[str, Callable[[], Figures]] = {
    "import": describe_build,
    "nf4": lambda: round_trip(_device(), _dtype_name()),
    "attention": check_attention,
    "head": check_head,
    "step": train_step,
    "flex": check_flex,  # last: it compiles longest
}


def main(output: Path) -> None:
    """Take every step."""
    if _device() == "cpu":
        torch.set_num_threads(1)  # the work is small there; threads would wait for each other
    do_steps(output, STEPS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
