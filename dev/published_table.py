"""The published memory table of Gemma 3 on a Strix Halo, predicted from its settings.

    python dev/published_table.py          # minutes, on any machine, no weights; prints Markdown

The table: kyuz0/amd-strix-halo-llm-finetuning, README.md (first commit, 2025-10-19); the settings:
workspace/gemma-finetuning.ipynb there. Its step is another one than ours, so it is built here from
plain transformers and PEFT and run under our tracker:

- weights in bf16 (`dtype="auto"`); LoRA adapters in float32, r 16, α 32, dropout 0.05, on the seven
  linear layers; autocast to bf16; eager attention; nothing recomputed; fused AdamW
- rows padded to 512 tokens, 4 in training and 8 in evaluation (the trainer's default), evaluation
  being part of what `torch.cuda.max_memory_allocated` saw
- full logits, in float32 for the loss; the trainer lets go of them before backward
- the text model alone; the vision tower of 4B and 12B is added in a column of its own

Tensors are fake ones on the CPU, because autocast does nothing on `meta`. Nothing is fitted.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from strixft.catalog.models import MODELS
from strixft.step.memory_tracker import MemoryTracker

aten = torch.ops.aten
GB = 1e9
LENGTH, TRAIN_ROWS, EVAL_ROWS = 512, 4, 8
VISION_GB = 0.417e9 * 2 / GB
"""SigLIP tower and projector in bf16: 0.417 G parameters by the model's `config.json`."""
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Cell:
    """One cell of the table; GB, rounded there to whole numbers."""

    model: str
    method: str
    measured_gb: int


CELLS = [
    Cell("google/gemma-3-1b-it", "full", 19),
    Cell("google/gemma-3-4b-it", "full", 46),
    Cell("google/gemma-3-12b-it", "full", 115),
    Cell("google/gemma-3-1b-it", "lora", 15),
    Cell("google/gemma-3-4b-it", "lora", 30),
    Cell("google/gemma-3-12b-it", "lora", 67),
]


class _Tracker(MemoryTracker):
    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten._local_scalar_dense.default:
            return 1
        if func is aten._fused_adamw_.default:  # in place
            return None
        return super().run(func, args, kwargs)


def build(cell: Cell) -> nn.Module:
    """Model and adapter on `meta`, as the notebook makes them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**MODELS[cell.model].config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="eager"
        )
        if cell.method == "full":
            return model.requires_grad_(True)
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=LINEAR)
        return get_peft_model(model, lora)  # float32 adapters: autocast_adapter_dtype


def to_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Give every tensor the device `cpu`, still without storage; tied ones stay tied."""
    made: dict[int, Any] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return mode.fake_tensor_converter.from_meta_and_device(mode, tensor, torch.device("cpu"))

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                data = fake(parameter.detach())
                made[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Dropout keeps a mask of a byte each, as on a GPU; on a CPU it would keep floats."""
    dropout = nn.functional.dropout
    nn.functional.dropout = lambda x, p=0.5, training=True, inplace=False: (
        torch.native_dropout(x, p, training)[0] if training and p else x
    )
    masking = importlib.import_module("transformers.masking_utils")
    tracing, masking.is_tracing = masking.is_tracing, lambda *_: False
    try:
        yield
    finally:
        nn.functional.dropout, masking.is_tracing = dropout, tracing


def loss_of(model: nn.Module, rows: int) -> torch.Tensor:
    """The trainer's loss: full logits, which only the loss outlives."""
    ids = torch.zeros(rows, LENGTH, dtype=torch.int64)
    mask = torch.ones_like(ids)
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss


def update(model: nn.Module, optimizer: torch.optim.Optimizer, trained: list[Any]) -> None:
    """One update of the trainer."""
    loss_of(model, TRAIN_ROWS).backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def predict(cell: Cell) -> tuple[int, int]:
    """Peak bytes of training, and of evaluation."""
    model, tracker, mode = build(cell), _Tracker(), FakeTensorMode()
    to_fake(model, mode)
    with mode, _as_on_a_gpu():
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        tracker.watch_model(model)
        with tracker:
            model.train()
            update(model, optimizer, trained)
            update(model, optimizer, trained)
            training, tracker.peak_bytes = tracker.peak_bytes, 0
            model.eval()
            with torch.no_grad():
                loss_of(model, EVAL_ROWS)
    return training, tracker.peak_bytes


def main() -> None:
    """Print the table."""
    print("| model | method | measured GB | training | evaluation | error | with vision tower |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for cell in CELLS:
        training, evaluation = (size / GB for size in predict(cell))
        peak = max(training, evaluation)
        vision = 0.0 if "1b" in cell.model else VISION_GB
        errors = [f"{found / cell.measured_gb - 1:+.1%}" for found in (peak, peak + vision)]
        row = [cell.model.partition("/")[2], cell.method, str(cell.measured_gb)]
        row += [f"{training:.2f}", f"{evaluation:.2f}", errors[0], errors[1] if vision else "–"]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
