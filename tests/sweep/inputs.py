"""What a run of the sweep starts from: a tiny model with a real tokenizer, rows, and a recipe."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from strixft.model.architecture import architecture_of
from strixft.model.files import embedded_folder
from strixft.support.errors import RecipeError
from sweep.models import GLM, GLM_TOKENS, NUMBERS, PREDICTING, SENTENCEPIECE, write_model

EMBEDDED = "embedded:smollm2-135m"
UPDATES = 10
RATE = 3e-3
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
             "special_tokens_map.json", "vocab.json", "merges.txt")  # fmt: skip
UNUSED = ("<repo_name>", "<file_sep>", "<gh_stars>")
"""Special tokens of SmolLM2 that no row has."""
WORDS = (
    "one two three four five six seven eight nine ten Say What is sentences about rain iron a"
    " bridge the moon bread violin electricity river salt gravity clock wood library heart glass"
)


@cache
def sentencepiece_model() -> bytes:
    """A tokenizer as Llama 2 and Gemma have, of few pieces, with the ends of SmolLM2's template."""
    import sentencepiece

    found = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 9), model_writer=found, model_type="bpe",
        vocab_size=NUMBERS["sentencepiece"], byte_fallback=True, character_coverage=1.0,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        unk_id=0, bos_id=1, eos_id=2, bos_piece="<|im_start|>", eos_piece="<|im_end|>",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return found.getvalue()


def _write_sentencepiece(folder: Path) -> None:
    from transformers import AutoTokenizer

    settings = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>", "unk_token": "<unk>", "add_bos_token": False,
        "add_eos_token": False, "legacy": False, "add_prefix_space": False,
    }  # fmt: skip
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def _add_predicting_head(folder: Path) -> None:
    """Add a head for a second token: a layer of full attention, norms, and a product of both."""
    path, last = folder / "model.safetensors", ".layers.2."
    tensors = load_file(path)
    layer = {key.partition(last)[2]: w for key, w in tensors.items() if last in key}
    norm = torch.ones(layer["input_layernorm.weight"].shape)
    tensors |= {f"mtp.layers.0.{key}": w.clone() for key, w in layer.items()}
    tensors |= {f"mtp.{key}.weight": norm.clone() for key in
                ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}  # fmt: skip
    tensors["mtp.fc.weight"] = torch.randn(len(norm), 2 * len(norm))
    save_file(tensors, path, {"format": "pt"})


def write_folder(folder: Path, name: str, sides: dict[str, Any]) -> None:
    """A random model as the hub has it, with a tokenizer of the kind that its type has."""
    write_model(folder, sides)
    if name in PREDICTING:
        _add_predicting_head(folder)
    tokenizer = embedded_folder(EMBEDDED)
    if name in SENTENCEPIECE:
        _write_sentencepiece(folder)
        shutil.copy(tokenizer / "chat_template.jinja", folder)
        return
    for file in TOKENIZER:
        with suppress(FileNotFoundError):
            shutil.copy(tokenizer / file, folder)
    if name in GLM:
        text = (folder / "tokenizer.json").read_text()
        for unused, token in zip(UNUSED, GLM_TOKENS, strict=True):
            text = text.replace(f'"{unused}"', f'"{token}"')
        (folder / "tokenizer.json").write_text(text)


def routes(model: Path) -> bool:
    """Whether a model has experts that are adapted, too."""
    try:
        return bool(architecture_of(AutoConfig.from_pretrained(model)).routed)
    except RecipeError:  # the stages refuse it, too
        return False


def write_recipe(folder: Path, model: Path) -> Path:
    """A recipe of a few updates, each of all rows."""
    numbers = WORDS.split()[:10]
    rows = [
        {"messages": [{"role": "user", "content": f"Say {word}."},
                      {"role": "assistant", "content": " ".join(numbers[: 1 + at])}]}
        for at, word in enumerate(numbers)
    ]  # fmt: skip
    data = folder / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    recipe = {
        "model": str(model),
        "method": "lora",
        "dataset": {"source": str(data), "max_length": 256, "validation_fraction": 0.2},
        "lora": {"r": 4, "alpha": 8, "experts": "all" if routes(model) else "shared"},
        "train": {
            "epochs": UPDATES, "learning_rate": RATE, "tokens_per_update": 10**6,
            "schedule": "constant", "warmup_fraction": 0, "compile": "none", "micro_batch": 2,
        },
        "evaluate": {"max_rows": 1, "metrics": ["exact_match"]},
        "export": {"gguf": ["f16"]},
        "memory": {"reserve_gib": 0.5},
        "offline": True,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # which YAML includes
    return path
