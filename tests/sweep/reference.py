"""Plain transformers and PEFT: losses of a plain loop, and logits in float64.

The reference trains each document by itself, with eager attention and a plain loop of AdamW.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from strixft.evaluate.variants import load_variant
from strixft.model.load import build
from strixft.prepare.stage import Prepared
from strixft.run.folder import Run
from strixft.train.stage import ADAPTER, Trained
from sweep.inputs import UPDATES

Document = tuple[Tensor, Tensor]
"""Token ids (T,), and which of them are trained (T,)."""


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


class Float64(TorchFunctionMode):
    """Runs a model of float64 weights without the float32 that classes ask for by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch with float64 in place of float32."""
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if one is torch.float32 else one for one in args]
        more = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **more)


@torch.no_grad()
def logits_of(model: Any, run: Run) -> Tensor:
    """Logits of the held-out documents, all positions of all of them: (P, V)."""
    rows = run.require(Prepared).token_rows(run.recipe.dataset).validation
    every = [model(input_ids=ids[None], use_cache=False).logits[0] for ids, _ in documents_of(rows)]
    return torch.cat(every)


def exact_logits(model: Any, run: Run) -> Tensor:
    """The same in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Float64():
            return logits_of(model.double(), run)
    finally:
        torch.set_default_dtype(before)


def share(left: Tensor, right: Tensor) -> float:
    """The largest difference of logits as a share of the largest logit."""
    return float((left - right).abs().max() / right.abs().max())


def logit_gaps(run: Run) -> dict[str, float]:
    """The adapter as strixft loads it, and the merged model as anybody does, beside plain PEFT."""
    adapter, base = run.folder / "train" / ADAPTER, plain_base(Path(run.recipe.model))
    due = exact_logits(PeftModel.from_pretrained(base, adapter).eval(), run)
    ours = logits_of(load_variant(run.recipe, adapter, "tuned"), run)
    merged = exact_logits(plain_base(run.folder / "export" / "merged"), run)
    return {"adapter": share(ours, due), "merged": share(merged, due)}


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name."""
    return {name: w for path in folder.glob("*.safetensors") for name, w in load_file(path).items()}
