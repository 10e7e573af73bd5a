"""Compare the merges of a synthetic 70B with fewer layers, and say what that held in memory.

python dev/merge_choice.py FOLDER [LAYERS]
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from strixft.export.candidates import compare_merges
from strixft.families import MODELS
from strixft.methods import METHODS
from strixft.model import build
from strixft.recipe import Recipe, check_recipe

MODEL = "meta-llama/Llama-3.3-70B-Instruct"
ROWS, TOKENS, TRAINED = 32, 8, 4


def recipe_of(base: Path) -> Recipe:
    """QLoRA on the synthetic checkpoint."""
    settings = {"model": str(base), "method": "qlora", "dataset": {"source": "unused.jsonl"}}
    return check_recipe(settings, name="synthetic")


def write_base(base: Path, adapter: Path, layers: int) -> None:
    """A checkpoint with the sides of the 70B, a file for each part, and an adapter."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**{**MODELS[MODEL].config, "num_hidden_layers": layers})
    config.save_pretrained(base)
    model = build(recipe_of(base), "meta", torch.bfloat16, config)
    trained: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            values = torch.randn(parameter.shape) / 100
            trained[name.replace(".default.", ".")] = values
    for number, (name, parameter) in enumerate(build_native(base, config).named_parameters()):
        weight = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(std=0.02)
        save_file({name: weight}, base / f"model-{number:05}.safetensors")
    save_file(trained, adapter / "adapter_model.safetensors")
    lora = recipe_of(base).lora
    peft = {"peft_type": "LORA", "r": lora.r, "lora_alpha": lora.alpha}
    (adapter / "adapter_config.json").write_text(
        json.dumps({**peft, "base_model_name_or_path": "x"})
    )


def build_native(base: Path, config: Any) -> torch.nn.Module:
    """The model without quantisation and adapter, on `meta`."""
    from strixft.model import shape_base

    return shape_base(config, METHODS["full"], torch.bfloat16)


def random_rows() -> list[dict[str, Any]]:
    """Rows whose last tokens are trained."""
    ids = torch.randint(5, 100_000, (ROWS, TOKENS)).tolist()
    mask = [False] * (TOKENS - TRAINED) + [True] * TRAINED
    return [{"input_ids": row, "trained": mask} for row in ids]


if __name__ == "__main__":
    folder, layers = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2
    base, adapter = folder / "base", folder / "adapter"
    if not base.is_dir():
        base.mkdir(parents=True)
        adapter.mkdir()
        write_base(base, adapter, layers)
        sys.exit("written; type it again to measure")
    began = time.monotonic()
    found = compare_merges(recipe_of(base), base, adapter, random_rows())
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(found))
    print(f"{time.monotonic() - began:.0f} s, peak resident {peak_gib:.2f} GiB")
