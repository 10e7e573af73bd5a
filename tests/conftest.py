"""Shared by all tests: a tiny random model with a real tokenizer, and small recipes on it."""

from __future__ import annotations

import json
import os
import runpy
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from strixft.run.folder import Run
from strixft.run.open import open_run

MACHINE = Path(__file__).parent / "machine"
runpy.run_path(str(MACHINE / "sitecustomize.py"))  # children find it by the variable
_PATHS = filter(None, (str(MACHINE), os.environ.get("PYTHONPATH")))  # an empty one is the folder
os.environ["PYTHONPATH"] = os.pathsep.join(_PATHS)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads would only wait
signal.signal(signal.SIGINT, signal.default_int_handler)  # `&` and `nohup` ignore what tests send
signal.signal(signal.SIGHUP, signal.SIG_DFL)
REPOSITORY = Path(__file__).resolve().parent.parent
EMBEDDED = "embedded:smollm2-135m"

SLOW = [
    "test_app_chat",
    "test_app_finish",
    "test_app_form",
    "test_app_lab",
    "test_app_notebooks",
    "test_app_terminal",
    "test_browser",
    "test_bench_run",
    "test_cli",
    "test_damage",
    "test_data_end_tokens",
    "test_docs",
    "test_doctor_mkl",
    "test_doctor_probe",
    "test_evaluate",
    "test_evaluate_judge",
    "test_export_merge",
    "test_export_stage",
    "test_faults",
    "test_fuzz",
    "test_gguf",
    "test_harness",
    "test_hostile",
    "test_merge",
    "test_methods",
    "test_methods_runs",
    "test_models",
    "test_opening",
    "test_plan",
    "test_plan_explore",
    "test_prepare_augment",
    "test_probe",
    "test_step_matrix_products",
    "test_step_update",
    "test_stop",
    "test_sweep",
    "test_target_kernels",
    "test_templates",
    "test_train",
]
"""Files of tests that take more than ten seconds each."""

WriteRecipe = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make check` leaves out."""
    assert {path.stem for path in Path(__file__).parent.rglob("test_*.py")}.issuperset(SLOW)
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test works in its own folder, without a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("STRIXFT_DATA", str(tmp_path / "data-folder"))
    monkeypatch.delenv("STRIXFT_DEVICE", raising=False)
    monkeypatch.chdir(tmp_path)


def write_tiny_model(folder: Path) -> Path:
    """A random Llama of two layers with the embedded model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from strixft.model.source import model_source

    tokenizer = AutoTokenizer.from_pretrained(model_source(EMBEDDED))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama of two layers with the embedded model's tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def chat(question: str, answer: str) -> dict[str, Any]:
    """One row of the `messages` format."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def chats(count: int) -> list[dict[str, Any]]:
    """Rows of different lengths, none twice."""
    return [
        chat(f"Count to {n}.", " ".join(map(str, range(1, n + 1)))) for n in range(1, count + 1)
    ]


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    """JSON lines; text goes in as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def recipe_writer(folder: Path, model: Path) -> WriteRecipe:
    """Writes a recipe on a model into a folder; sections are merged into it."""

    def write(name: str = "tiny", rows: Sequence[Any] | None = None, **sections: Any) -> Path:
        data = write_lines(folder / f"{name}.jsonl", chats(24) if rows is None else rows)
        recipe: dict[str, Any] = {
            "model": str(model),
            "method": "lora",
            "dataset": {"source": data.name, "max_length": 256, "validation_fraction": 0.2},
            "lora": {"r": 4, "alpha": 8},
            "train": {
                "epochs": 1,
                "learning_rate": 2e-3,
                "tokens_per_update": 100,
                "compile": "none",  # a plan for a GPU would compile for seconds
            },
            "memory": {"reserve_gib": 0.5},
        }
        for key, value in sections.items():
            both = isinstance(value, dict) and isinstance(recipe.get(key), dict)
            recipe[key] = {**recipe[key], **value} if both else value
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_model: Path) -> WriteRecipe:
    """Writes a recipe on the tiny model for one test."""
    return recipe_writer(tmp_path, tiny_model)


@pytest.fixture(scope="module")
def write_module_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> WriteRecipe:
    """Writes a recipe on the tiny model for all tests of a module."""
    return recipe_writer(tmp_path_factory.mktemp("recipes"), tiny_model)


def mark_as_trained(folder: Path) -> None:
    """Give a run a checkpoint: from then on its settings are taken."""
    (folder / "train" / "checkpoints" / "checkpoint-1").mkdir(parents=True)


@pytest.fixture
def tiny_run(write_recipe: WriteRecipe, tmp_path: Path) -> Run:
    """A new run of a recipe on the tiny model."""
    return open_run(write_recipe(), tmp_path / "run")
