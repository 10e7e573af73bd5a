"""Merge a synthetic checkpoint and time it beside a plain copy of the same file.

python dev/merge_speed.py FOLDER [GIGABYTES]
"""

import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from strixft.export.merge import merge
from strixft.recipe.schema import Recipe

C, D, R = 4096, 14336, 16


def write_base(base: Path, adapter: Path, gigabytes: float) -> None:
    """Matrices of an 8B's feed-forward layers, and an adapter for all of them."""
    count = max(1, int(gigabytes * 1e9 / (2 * C * D)))
    names = [f"model.layers.{n}.mlp.up_proj" for n in range(count)]
    files = {f"{name}.weight": f"model-{n:05}.safetensors" for n, name in enumerate(names)}
    for name, file in files.items():
        save_file({name: torch.randn(D, C, dtype=torch.bfloat16)}, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    pairs = {"lora_A": torch.randn(R, C), "lora_B": torch.randn(D, R)}
    tensors = {
        f"base_model.model.{n}.{k}.weight": v.clone() for n in names for k, v in pairs.items()
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    LlamaConfig(hidden_size=C, intermediate_size=D, num_hidden_layers=count).save_pretrained(base)
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 2 * R, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def copied(base: Path, target: Path) -> float:
    """Seconds of a plain copy, flushed to disk."""
    target.mkdir()
    began = time.monotonic()
    for file in sorted(base.iterdir()):
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as written:
            os.fsync(written.fileno())
    seconds = time.monotonic() - began
    shutil.rmtree(target)
    return seconds


if __name__ == "__main__":
    folder, size = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 3.0
    base, adapter, target = (folder / name for name in ("base", "adapter", "merged"))
    if not base.is_dir():
        base.mkdir(parents=True)
        adapter.mkdir()
        write_base(base, adapter, size)
        sys.exit("written; type it again to measure")
    copy_s = copied(base, folder / "copy")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    began = time.monotonic()
    recipe = Recipe.model_validate({"model": str(base), "dataset": {"source": "none"}})
    merge(recipe, base, adapter, target)
    merge_s = time.monotonic() - began
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"copy {copy_s:.1f} s, merge {merge_s:.1f} s, {copy_s / merge_s:.2f} of a copy's speed")
    print(f"peak resident {peak_gib:.2f} GiB")
