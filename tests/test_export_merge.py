"""The streamed merge: what PEFT merges, in bounded memory, and what does not belong together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WriteRecipe
from safetensors.torch import load_file, save_file
from test_train import trained

from strixft.errors import HostError, StageError
from strixft.export import export_recipe
from strixft.export.merge import as_stored, merge, read_updates
from strixft.model import load_adapter, load_base
from strixft.opening import open_run
from strixft.recipe import load_recipe
from strixft.runs import Run
from strixft.train import ADAPTER

PEAK = """
import resource, sys
from pathlib import Path
from strixft.export.merge import merge
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(*map(Path, sys.argv[1:4]), "native")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def merged_model(run: Run, target: Path, base: str = "native") -> dict[str, torch.Tensor]:
    target.mkdir()
    merge(Path(run.recipe.model), run.stage_folder("train") / ADAPTER, target, base)
    found: dict[str, torch.Tensor] = load_file(target / "model.safetensors")
    return found


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_it_is_what_peft_merges(method: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    run = open_run(write_recipe(method=method), tmp_path / "run")
    trained(run)
    ours = merged_model(run, tmp_path / "merged")
    model = load_base(run.recipe, "cpu", torch.float32)
    adapted: Any = load_adapter(model, run.stage_folder("train") / ADAPTER)
    theirs = adapted.merge_and_unload()
    for name, weight in theirs.state_dict().items():
        if name in ours:
            torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=1e-5)
    assert sum("proj" in name for name in ours) == 14


def test_a_quantised_base_is_merged_as_training_saw_it(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    run = open_run(write_recipe(method="qlora"), tmp_path / "run")
    trained(run)
    adapter = run.stage_folder("train") / ADAPTER
    tuned = load_adapter(load_base(run.recipe, "cpu", torch.float32), adapter).eval()
    merged_model(run, tmp_path / "merged", "nf4")
    same = load_recipe(write_recipe("same", model=str(tmp_path / "merged")))
    merged = load_base(same, "cpu", torch.float32).eval()
    ids = torch.arange(100, 140).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, tuned(ids).logits, atol=2e-3, rtol=2e-3)


def test_8_bit_weights_are_near_the_original_ones() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    stored = as_stored(weight, "int8")
    assert 0 < (stored - weight).abs().max() < weight.abs().max() / 127


def big_base(folder: Path, adapter: Path, matrices: int) -> None:
    """A checkpoint of 8 MiB matrices and an adapter for all of them."""
    for path in (folder, adapter):
        path.mkdir()
    names = [f"model.layers.{n}.mlp.up_proj" for n in range(matrices)]
    weights = {f"{name}.weight": torch.zeros(2048, 2048, dtype=torch.bfloat16) for name in names}
    save_file(weights, folder / "model.safetensors")
    pairs = {"lora_A": torch.ones(8, 2048), "lora_B": torch.ones(2048, 8)}
    save_file(
        {f"base_model.model.{n}.{k}.weight": v.clone() for n in names for k, v in pairs.items()},
        adapter / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "base_model_name_or_path": "x"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    base, adapter, target = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    big_base(base, adapter, 48)  # 384 MiB
    target.mkdir()
    words = [sys.executable, "-c", PEAK, str(base), str(adapter), str(target)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 250 * 1024  # KiB; PEFT and its libraries are in it
    assert load_file(target / "model.safetensors")["model.layers.0.mlp.up_proj.weight"][0, 0] == 8


def test_an_adapter_of_another_base_is_refused(tiny_run: Run, tmp_path: Path) -> None:
    trained(tiny_run)
    adapter = tiny_run.stage_folder("train") / ADAPTER
    other, target = tmp_path / "other", tmp_path / "merged"
    big_base(other, tmp_path / "unused", 1)
    target.mkdir()
    with pytest.raises(StageError, match=r"it is another base model's"):
        merge(other, adapter, target, "native")


def test_a_base_that_changed_since_is_refused(
    tiny_model: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    run = open_run(write_recipe(model=str(copy)), tmp_path / "run")
    trained(run)
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageError, match=r"another base model: model\.safetensors of") as caught:
        export_recipe(run, ("merged",))
    assert "--from train" in caught.value.fix
    assert not run.is_done("export")


def test_no_room_is_known_before_it_starts(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tiny_run)
    monkeypatch.setattr("strixft.disk.free_bytes", lambda _: 1000)
    with pytest.raises(HostError, match=r"is full: .* are needed"):
        export_recipe(tiny_run, ("merged",))
    assert not list(tiny_run.stage_folder("export").glob("*merged*"))


def test_an_adapter_with_more_than_lora_is_refused(tiny_run: Run) -> None:
    trained(tiny_run)
    adapter = tiny_run.stage_folder("train") / ADAPTER
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.modules_to_save.weight"] = torch.zeros(1)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(StageError, match="not known how to merge"):
        read_updates(adapter)
