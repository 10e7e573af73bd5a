"""The merge in bounded memory, beside the trained model, and what does not belong together."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WriteRecipe
from safetensors.torch import load_file, save_file
from test_train import trained
from transformers import AutoModelForCausalLM, LlamaConfig

from strixft.app.report import render_report
from strixft.export.check import LEAST_TOP1, MOST_DIFFERENCE, MOST_KL, ROWS, load_merged
from strixft.export.merge import as_stored, load_adapted, merge
from strixft.export.stage import export_recipe
from strixft.model.source import load_config
from strixft.recipe.load import load_recipe
from strixft.run.folder import Run
from strixft.run.open import open_run
from strixft.support.errors import HostError, StageError
from strixft.train.stage import ADAPTER

PEAK = """
import resource, sys
from pathlib import Path
from transformers import LlamaForCausalLM
import peft.tuners.lora
from strixft.export.merge import load_adapted
from strixft.export.merge import merge
from strixft.model.source import load_config
from strixft.recipe.load import load_recipe
from strixft.app.report import render_report
recipe, (base, adapter, target) = load_recipe(Path(sys.argv[1])), map(Path, sys.argv[2:])
load_adapted(load_config(recipe), adapter, "cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(recipe, base, adapter, target)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "int8-lora", "full"])
def test_the_merged_model_is_compared_with_the_trained_one(
    method: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    run = open_run(write_recipe(method=method), tmp_path / "run")
    trained(run)
    result = export_recipe(run, ("merged",))
    found = result.figures["made"]["merged"]["check"]
    assert found["rows"] == ROWS
    assert found["exact"] is (method in ("lora", "dora", "full"))
    assert found["top1"] >= LEAST_TOP1
    assert found["kl"] <= MOST_KL
    assert not found["offloaded"]
    assert "same next token" in render_report(run)
    card = (Path(result.figures["made"]["merged"]["path"]) / "README.md").read_text()
    assert "| KL, nats a token |" in card


def test_a_merge_of_less_than_was_trained_is_no_export(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is set to zero after it was read: the merge is the base."""
    run = open_run(write_recipe(train={"learning_rate": 1e-2, "epochs": 2}), tmp_path / "run")
    trained(run)

    def forgetful(*words: Any) -> Any:
        model = load_adapted(*words)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        return model

    monkeypatch.setattr("strixft.export.merge.load_adapted", forgetful)
    with pytest.raises(StageError, match="the merged model is not the trained one") as caught:
        export_recipe(run, ("merged",))
    assert "gguf-lora" in caught.value.fix
    assert not run.is_done("export")
    assert not (run.stage_folder("export") / "merged").exists()


def test_where_the_base_rounds_too_much_away_weights_are_written_in_float32(
    tiny_model: Path, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a bound that bf16 cannot keep and float32 can, trained and answering in bf16."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "half"))
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(folder)
    run = open_run(write_recipe(model=str(folder)), tmp_path / "run")
    trained(run)
    monkeypatch.setattr("strixft.export.check.MOST_KL", 1e-8)
    for module in ("evaluate.variants", "export.check"):  # as on a GPU
        monkeypatch.setattr(f"strixft.{module}.training_dtype", lambda: torch.bfloat16)
    made = export_recipe(run, ("merged",)).figures["made"]["merged"]
    assert made["rounded"]["faults"]
    assert not made["check"]["exact"]
    assert made["check"]["max_difference"] < MOST_DIFFERENCE  # activations in bf16: 1e-2
    weights = load_file(Path(made["path"]) / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert json.loads((Path(made["path"]) / "config.json").read_text())["dtype"] == "float32"
    assert "float32; the base&#x27;s types would give KL" in render_report(run)


def test_a_model_that_does_not_fit_is_compared_from_disk(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    run = open_run(write_recipe(), tmp_path / "run")
    trained(run)
    merged = Path(export_recipe(run, ("merged",)).figures["made"]["merged"]["path"])
    ids = torch.arange(100, 140).unsqueeze(0)
    size_bytes = (merged / "model.safetensors").stat().st_size
    whole, part = (load_merged(run.recipe, merged, bytes_) for bytes_ in (2**40, size_bytes // 2))
    assert [offloaded for _, offloaded in (whole, part)] == [False, True]
    assert any(parameter.is_meta for parameter in part[0].parameters())
    with torch.no_grad():
        torch.testing.assert_close(part[0](ids).logits, whole[0](ids).logits)
    assert sorted(path.name for path in merged.glob("*.safetensors")) == ["model.safetensors"]


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
    sides = {"hidden_size": 2048, "intermediate_size": 2048, "vocab_size": 32}
    LlamaConfig(num_hidden_layers=matrices, **sides).save_pretrained(folder)
    pairs = {"lora_A": torch.ones(8, 2048), "lora_B": torch.ones(2048, 8)}
    save_file(
        {f"base_model.model.{n}.{k}.weight": v.clone() for n in names for k, v in pairs.items()},
        adapter / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def test_memory_does_not_grow_with_the_file(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    base, adapter, target = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    big_base(base, adapter, 16)  # 128 MiB
    target.mkdir()
    recipe = write_recipe(model=str(base))
    words = [sys.executable, "-c", PEAK, *map(str, (recipe, base, adapter, target))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 100 * 1024  # KiB; a matrix in float32 has 16 MiB
    assert load_file(target / "model.safetensors")["model.layers.0.mlp.up_proj.weight"][0, 0] == 8


def test_an_adapter_of_another_base_is_refused(
    tiny_run: Run, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    trained(tiny_run)
    adapter = tiny_run.stage_folder("train") / ADAPTER
    other, target = tmp_path / "other", tmp_path / "merged"
    big_base(other, tmp_path / "unused", 1)
    target.mkdir()
    with pytest.raises(StageError, match=r"for another base model"):
        merge(load_recipe(write_recipe("other", model=str(other))), other, adapter, target)


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
    monkeypatch.setattr("strixft.support.files.free_bytes", lambda _: 1000)
    with pytest.raises(HostError, match=r"is full: .* are needed"):
        export_recipe(tiny_run, ("merged",))
    assert not list(tiny_run.stage_folder("export").glob("*merged*"))


def test_an_adapter_with_more_than_lora_is_refused(tiny_run: Run) -> None:
    trained(tiny_run)
    adapter = tiny_run.stage_folder("train") / ADAPTER
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.modules_to_save.weight"] = torch.zeros(1)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(StageError, match="which cannot be merged"):
        load_adapted(load_config(tiny_run.recipe), adapter, "cpu")


def test_an_adapter_that_lacks_a_layer_is_refused(tiny_run: Run) -> None:
    trained(tiny_run)
    adapter = tiny_run.stage_folder("train") / ADAPTER
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1.mlp" not in name}
    save_file(kept, adapter / "adapter_model.safetensors")
    with pytest.raises(StageError, match=r"do not belong together: .*layers\.1\.mlp"):
        load_adapted(load_config(tiny_run.recipe), adapter, "cpu")
