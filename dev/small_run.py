"""Small jobs on this device, from the rows to the trained weights, beside their plans.

    python dev/small_run.py [METHOD …]       # qlora if none is named; also lora, full, …

A model of Llama 3.2 1B's sides with random weights learns 1,300 short chats: what most people run
first. Prints one line of JSON for each: reserved memory and speed by the plan and as measured, the
proof of the first loss, and the seconds of each stage.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from strixft import open_run, plan_recipe, prepare_recipe, train_recipe
from strixft.guard.host import device_type

ROWS, VOCABULARY = 1300, 128_256
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
CASES: dict[str, dict[str, Any]] = {
    "qlora": {"method": "qlora"},
    "lora": {"method": "lora"},
    "full": {"method": "full"},
    "unpacked": {"method": "qlora", "dataset": {"packing": False}},
    "lora-unpacked": {"method": "lora", "dataset": {"packing": False}},
}


def write_model(folder: Path) -> None:
    """A random model, made on the device, and a tokenizer of numbered words."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device(device_type()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    named = ["<s>", "</s>", "<pad>", "<unk>", "user", "assistant"]
    words = [*named, *(f"w{number}" for number in range(VOCABULARY - len(named)))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def write_rows(path: Path) -> None:
    """Chats of 20 to 200 tokens, half of them the answer's."""
    drawn = random.Random(0)

    def said(count: int) -> str:
        return " ".join(f"w{drawn.randrange(100_000)}" for _ in range(count))

    with path.open("w") as file:
        for _ in range(ROWS):
            turns = [(role, said(drawn.randrange(10, 100))) for role in ("user", "assistant")]
            messages = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps({"messages": messages}) + "\n")


def timed(seconds: dict[str, float], name: str, work: Any, run: Any) -> Any:
    """Do a stage and note its seconds."""
    began = time.monotonic()
    result = work(run)
    seconds[name] = round(time.monotonic() - began, 1)
    return result


def measure(folder: Path, name: str) -> dict[str, Any]:
    """Train a case; planned and measured figures."""
    dataset = {"source": "rows.jsonl", "max_length": 1024, **CASES[name].get("dataset", {})}
    recipe = {"model": "model", "train": {"epochs": 2}, **CASES[name], "dataset": dataset}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**recipe, "offline": True}))
    run, seconds = open_run(path, folder / f"run-{name}"), dict[str, float]()
    timed(seconds, "prepare", prepare_recipe, run)
    plan = timed(seconds, "plan", plan_recipe, run).figures
    found = timed(seconds, "train", train_recipe, run).figures
    rate, planned_rate = found["tok_per_s"], plan["tok_per_s"]
    reserved, planned = found["reserved_bytes"], plan["reserved_bytes"]
    return {
        "case": name,
        "choice": {k: v for k, v in plan["choice"].items() if k != "packed"},
        "updates": found["updates"],
        "losses": [round(found["losses"][n], 4) for n in (0, -1)],
        "peak_gb": [round(n / 1e9, 3) for n in (found["peak_bytes"] or 0, plan["peak_bytes"])],
        "reserved_gb": [round(n / 1e9, 3) for n in (reserved or 0, planned)],
        "reserved_off": reserved and round(reserved / planned - 1, 4),
        "tok_per_s": [rate, planned_rate and round(planned_rate)],
        "speed_off": rate and planned_rate and round(rate / planned_rate - 1, 4),
        "train_s": found["train_seconds"],
        "proof": found["proof"],
        "seconds": seconds,
    }


def main(names: list[str]) -> None:
    """Print what each case has come to."""
    with tempfile.TemporaryDirectory(prefix="small-run-") as name:
        folder = Path(name)
        write_model(folder / "model")
        write_rows(folder / "rows.jsonl")
        for case in names or ["qlora"]:
            print(json.dumps(measure(folder, case)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
