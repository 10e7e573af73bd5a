"""Loss curves of 100 updates in bf16, ours beside TRL's, on the same rows.

    python dev/curves.py TEXTS.jsonl [METHOD] [LAYERS]      # lora, qlora or full; 16 layers

The model is a Llama of the 1B's shape with random weights and 8,192 words, which are learned from
the texts; every token is trained. Both start from the same weights and the same adapter. TRL pads
eight rows and runs SDPA; ours packs them, with whatever attention and kernels this device takes.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from strixft.catalog.methods import METHODS
from strixft.data.batches import PackedShape, collate, on_device
from strixft.guard.host import find_host
from strixft.model.load import build, native_dtype
from strixft.model.quantised import NF4
from strixft.model.source import load_config
from strixft.probe.job import Job
from strixft.recipe.schema import Dataset, Lora, Recipe, Train
from strixft.step.update import TrainingStep

UPDATES, ROWS, LENGTH, VOCABULARY = 100, 8, 512, 8192
RATES = {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5}
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}

Rows = list[list[int]]


def token_rows(path: Path) -> Rows:
    """Rows of token ids, of words learned from the same texts."""
    from tokenizers import ByteLevelBPETokenizer

    texts = [line for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 200]
    words = ByteLevelBPETokenizer()
    words.train_from_iterator(texts, VOCABULARY, special_tokens=["<pad>", "<end>"])
    rows = [words.encode(text).ids[:LENGTH] for text in texts]
    return (rows * (1 + UPDATES * ROWS // len(rows)))[: UPDATES * ROWS]


def write_base(folder: Path, layers: int) -> None:
    """Random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, vocab_size=VOCABULARY)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def _recipe(folder: Path, method: str) -> Recipe:
    return Recipe(
        model=str(folder),
        method=method,
        dataset=Dataset(source="none", max_length=LENGTH),
        lora=Lora(r=16, alpha=32),
        train=Train(learning_rate=RATES[method], weight_decay=0.0),
    )


def ours(folder: Path, method: str, rows: Rows) -> Iterator[float]:
    """Losses of our step."""
    recipe, host = _recipe(folder, method), find_host("auto")
    dtype = native_dtype(host.device, bfloat16=host.bfloat16)
    torch.manual_seed(1)
    model = build(recipe, host.device, dtype)
    step = TrainingStep(model, recipe.train, Job.of(recipe, load_config(recipe), host).options)
    print(f"# ours: {step.ways}", file=sys.stderr)
    shape = PackedShape(ROWS * LENGTH, ROWS + 1, ROWS * LENGTH)
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        packed = {
            "input_ids": [token for row in some for token in row],
            "trained": [bool(place) for row in some for place in range(len(row))],
            "lengths": [len(row) for row in some],
        }
        yield float(step.update([on_device(collate([packed], shape), host.device)]))


def _their_model(folder: Path, method: str, device: str, dtype: torch.dtype) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    stored = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype) if method == "qlora" else None
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": device},
        attn_implementation="sdpa",
        quantization_config=stored,
    )
    if METHODS[method].adapter == "none":
        return model
    targets = "all-linear"
    config = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    return get_peft_model(model, config)


def theirs(folder: Path, method: str, rows: Rows) -> list[float]:
    """Losses of TRL's trainer."""
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    host = find_host("auto")
    dtype = native_dtype(host.device, bfloat16=host.bfloat16)
    with tempfile.TemporaryDirectory() as output:
        settings = SFTConfig(
            output_dir=output,
            per_device_train_batch_size=ROWS,
            max_steps=UPDATES,
            max_length=LENGTH,
            learning_rate=RATES[method],
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=dtype == torch.bfloat16,
            use_cpu=host.device == "cpu",
        )
        trainer = SFTTrainer(
            model=_their_model(folder, method, host.device, dtype),
            args=settings,
            train_dataset=Table.from_dict({"input_ids": rows}),
            processing_class=_no_words(PreTrainedTokenizerFast),
        )
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def _no_words(kind: Any) -> Any:
    """A tokenizer that has what TRL asks for: rows are tokens already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<end>"))
    return kind(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def main(texts: str, method: str = "qlora", layers: str = "16") -> None:
    """Print both curves, every tenth update, and how far they are apart."""
    rows = token_rows(Path(texts))
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), int(layers))
        pairs = list(
            zip(
                ours(Path(folder), method, rows),
                theirs(Path(folder), method, rows),
                strict=True,
            )
        )
    off = [mine / other - 1 for mine, other in pairs]
    for update in (0, *range(9, UPDATES, 10)):
        mine, other = pairs[update]
        print(f"{update + 1:4}  ours {mine:.4f}  TRL {other:.4f}  {off[update]:+.3%}")
    found = {
        "method": method,
        "updates": len(off),
        "median_off": statistics.median(map(abs, off)),
        "most_off": max(map(abs, off)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
