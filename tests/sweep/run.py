"""Every stage of one tiny model, beside plain transformers and PEFT.

All rows are one update, so that the losses need no order of rows; the reference trains each
document by itself, with eager attention and a plain loop of AdamW.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

import strixft
from strixft.model.files import embedded_folder
from strixft.model.load import build
from strixft.plan.result import Plan
from strixft.prepare.stage import Prepared
from strixft.run.folder import Run
from strixft.run.open import open_run
from strixft.support.errors import StrixftError
from strixft.train.stage import ADAPTER, Trained
from sweep.models import REFUSED, write_model

EMBEDDED = "embedded:smollm2-135m"
UPDATES = 5
RATE = 3e-3
TOLERANCES = {"first loss": 1e-4, "losses": 1e-3, "adapter": 3e-5, "merged": 5e-5}
"""Of a loss in nats; of all losses as a share; of logits as a share of the largest."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
             "special_tokens_map.json", "vocab.json", "merges.txt")  # fmt: skip
Document = tuple[Tensor, Tensor]
"""Token ids (T,), and which of them are trained (T,)."""


@dataclass
class Outcome:
    """What became of one type."""

    name: str
    refused: str = ""
    """The error's sentence, if a stage refused."""
    stage: str = ""
    """The last stage that began."""
    gaps: dict[str, float] = field(default_factory=dict)
    packed: bool = False
    """Several documents shared a row."""
    gguf: str = ""
    """Parity with llama.cpp, or why there is none; empty if it was not tried."""

    @property
    def far(self) -> dict[str, float]:
        """Gaps that are larger than they may be."""
        return {name: gap for name, gap in self.gaps.items() if not gap <= TOLERANCES[name]}


def verdict(found: Outcome) -> str | None:
    """What is wrong with an outcome, or None."""
    due = REFUSED.get(found.name)
    if due is None and found.refused:
        return f"{found.stage} refused: {found.refused}"
    if due is not None and not re.search(due, found.refused):
        return f"should be refused with {due!r}, not {found.refused!r}"
    return f"too far from transformers and PEFT: {found.far}" if found.far else None


def write_with_tokenizer(folder: Path, sides: dict[str, Any]) -> None:
    """A random model as the hub has it, and a real tokenizer beside it."""
    write_model(folder, sides)
    tokenizer = embedded_folder(EMBEDDED)
    for name in TOKENIZER:
        with suppress(FileNotFoundError):
            shutil.copy(tokenizer / name, folder)


def write_recipe(folder: Path, model: Path) -> Path:
    """A recipe of a few updates, each of all rows."""
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
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
        "lora": {"r": 4, "alpha": 8},
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


def sweep(name: str, sides: dict[str, Any], folder: Path, *, gguf: bool = False) -> Outcome:
    """Take a tiny model through all stages."""
    found, model = Outcome(name), folder / "model"
    write_with_tokenizer(model, sides)
    run = open_run(write_recipe(folder, model), folder / "run")
    try:
        for stage in ("prepare", "plan", "train", "evaluate"):
            found.stage = stage
            getattr(strixft, f"{stage}_recipe")(run)
        found.packed = run.require(Plan).figures["choice"]["packed"] is not None
        found.gaps |= training_gaps(run)
        found.gaps["adapter"] = adapter_gap(run)
        found.stage = "export"
        strixft.export_recipe(run, ("merged",))
        found.gaps["merged"] = merged_gap(run)
    except StrixftError as error:
        found.refused = error.problem
        return found
    if gguf:
        found.gguf = gguf_outcome(run)
    return found


def gguf_outcome(run: Run) -> str:
    """The sentence of a refusal, or the parity with llama.cpp."""
    try:
        exported = strixft.export_recipe(run, ("gguf",))
        exported.require_parity()
    except StrixftError as error:
        return error.problem
    parity = exported.figures["parity"]["f16"]
    return f"top-1 {parity['top1']:.3f}"


def plain_base(folder: Path) -> Any:
    """The model as anybody loads it: float32, eager attention, experts one by one."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    auto = AutoModelForCausalLM if kind in CAUSAL else AutoModelForImageTextToText
    base = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with suppress(ValueError):
        base.set_experts_implementation("eager")
    return base.eval()


def documents_of(rows: Any) -> list[Document]:
    """The documents of token rows."""
    return [
        (torch.tensor(list(row["input_ids"])).long(), torch.tensor(list(row["trained"])).bool())
        for row in rows
    ]


def loss_sum(model: Any, document: Document) -> Tensor:
    """The losses of a document's trained tokens, added up."""
    ids, trained = document
    logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
    places = trained[1:].nonzero().flatten()
    return nn.functional.cross_entropy(logits[places], ids[places + 1], reduction="sum")


def reference_losses(run: Run, model: Any, documents: list[Document]) -> list[float]:
    """Losses of a plain loop: AdamW and clipping."""
    train, losses = run.recipe.train, []
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=train.learning_rate, weight_decay=0.0)
    count = sum(int(trained[1:].sum()) for _, trained in documents)
    for _ in range(UPDATES):
        total = 0.0
        for document in documents:
            loss = loss_sum(model, document) / count
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(weights, train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def training_gaps(run: Run) -> dict[str, float]:
    """Our losses beside those of PEFT from the same first adapter."""
    losses = run.require(Trained).figures["losses"]
    set_seed(run.recipe.train.seed)
    first: Any = build(run.recipe, "cpu", torch.float32)
    first.save_pretrained(run.folder / "first")
    model = PeftModel.from_pretrained(
        plain_base(Path(run.recipe.model)), run.folder / "first", is_trainable=True
    ).eval()
    rows = run.require(Prepared).token_rows(run.recipe.dataset).train
    plain = reference_losses(run, model, documents_of(rows))
    relative = [abs(a - b) / b for a, b in zip(losses, plain, strict=True)]
    return {"first loss": abs(losses[0] - plain[0]), "losses": max(relative)}


@torch.no_grad()
def logits_of(model: Any, run: Run) -> Tensor:
    """Logits of the held-out documents, all positions of all of them: (P, V)."""
    rows = run.require(Prepared).token_rows(run.recipe.dataset).validation
    every = [model(input_ids=ids[None], use_cache=False).logits[0] for ids, _ in documents_of(rows)]
    return torch.cat(every).float()


def share(left: Tensor, right: Tensor) -> float:
    """The largest difference of logits as a share of the largest logit."""
    return float((left - right).abs().max() / right.abs().max())


def _tuned(run: Run) -> Any:
    return PeftModel.from_pretrained(
        plain_base(Path(run.recipe.model)), run.folder / "train" / ADAPTER
    ).eval()


def adapter_gap(run: Run) -> float:
    """The adapter as strixft loads it, and as PEFT alone does."""
    from strixft.evaluate.variants import load_variant

    ours = load_variant(run.recipe, run.folder / "train" / ADAPTER, "tuned")
    return share(logits_of(ours, run), logits_of(_tuned(run), run))


def merged_gap(run: Run) -> float:
    """The merged model as anybody loads it, and PEFT's adapter."""
    return share(
        logits_of(plain_base(run.folder / "export" / "merged"), run), logits_of(_tuned(run), run)
    )
