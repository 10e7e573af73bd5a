"""The plan against a GPU: predicted and measured peak of the same training step.

    python dev/plan_accuracy.py predict > dev/plan-accuracy-predicted.json     # any machine
    python dev/plan_accuracy.py measure dev/plan-accuracy-predicted.json       # with a GPU

Weights are random and made on the device: memory does not depend on their values. Each case runs in
a process of its own, two updates, and prints one line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strixft.hardware import HOSTS
from strixft.recipe import Dataset, Lora, Recipe, Train


@dataclass(frozen=True)
class Case:
    """One training step."""

    model: str
    method: str
    rows: int
    length: int
    recomputed: int


SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-70b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "qwen3-14b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "gemma3-4b": {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
    },
}
CASES = [
    Case("llama-1b", "full", 4, 1024, 0),
    Case("llama-1b", "lora", 1, 512, 0),
    Case("llama-8b", "qlora", 1, 2048, 0),
    Case("llama-8b", "lora", 2, 1024, 16),
    Case("qwen3-14b", "qlora", 1, 4096, 40),
    Case("gemma3-4b", "lora", 1, 1024, 0),
    Case("gemma3-4b", "lora", 1, 2048, 0),
    Case("llama-70b", "qlora", 1, 2048, 80),
]


def config_of(case: Case) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**SHAPES[case.model])


def recipe_of(case: Case) -> Recipe:
    return Recipe(
        model=case.model,
        method=case.method,
        dataset=Dataset(source="none"),
        lora=Lora(),
        train=Train(),
    )


def predict(case: Case) -> dict[str, Any]:
    from strixft.plan import RowShape, dry_run

    began = time.monotonic()
    shape = RowShape(case.rows, case.length, case.rows * case.length // 2)
    found = dry_run(recipe_of(case), config_of(case), HOSTS["h200-141"], shape, case.recomputed)
    return {
        **vars(case),
        "predicted": found.peak_bytes,
        "resident": found.resident_bytes,
        "parts": found.parts,
        "plan_s": round(time.monotonic() - began, 2),
    }


def measure(row: dict[str, Any]) -> dict[str, Any]:
    import torch

    from strixft.data import shape_batch
    from strixft.model import random_model
    from strixft.step import TrainingStep

    case = Case(**{name: row[name] for name in Case.__dataclass_fields__})
    model = random_model(recipe_of(case), config_of(case), "cuda", torch.bfloat16)
    loaded = torch.cuda.memory_allocated()
    step = TrainingStep(model, recipe_of(case).train, recomputed_layers=case.recomputed)
    batch = shape_batch(case.rows, case.length, case.rows * case.length // 2, "cuda")
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(3):
        began = time.monotonic()
        step.update([batch])
        torch.cuda.synchronize()
        times.append(round(time.monotonic() - began, 3))
    stats = torch.cuda.memory_stats()
    return {
        **row,
        "measured": torch.cuda.max_memory_allocated(),
        "requested": stats["requested_bytes.all.peak"],
        "reserved": torch.cuda.max_memory_reserved(),
        "loaded": loaded,
        "after": torch.cuda.memory_allocated(),
        "seconds": times,
    }


if __name__ == "__main__":
    if sys.argv[1] == "predict":
        print(json.dumps([predict(case) for case in CASES], indent=1))
    elif sys.argv[1] == "one":
        print(json.dumps(measure(json.loads(sys.argv[2]))), flush=True)
    else:
        for row in json.loads(Path(sys.argv[2]).read_text()):
            subprocess.run([sys.executable, __file__, "one", json.dumps(row)], check=False)
