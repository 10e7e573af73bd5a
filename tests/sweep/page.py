"""The page of all types, docs/models.md, from their outcomes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sweep.inputs import UPDATES
from sweep.models import SWEPT
from sweep.run import TOLERANCES, Outcome, verdict

INTRODUCTION = """# Model types

What a model is like is found out from the model ([plan.md](plan.md)), not read from a list of
families. This table is the proof: a tiny random model of each type, a wrapper with its tower as the
hub ships it, through prepare, plan, train, evaluate and export on a CPU, uncompiled. **Nothing here
ran on a gfx1151.** What the names of much downloaded models lead to is in [hub-models.md](hub-models.md).

    make sweep

wrote this page, with transformers {transformers}, PEFT {peft} and torch {torch}: {right} types
right, {refused} refused, {gguf} equal in llama.cpp.

*Right* means, beside transformers and PEFT alone (each document by itself, eager attention, a plain
loop of AdamW from the same first adapter):

| compared | at most | largest here |
| --- | --- | --- |
| first loss | {first_loss:g} nats | {most_first_loss:.1e} |
| all losses of {updates} updates | {losses:g} of the loss | {most_losses:.1e} |
| logits of the trained model, and of the adapter in plain PEFT | {adapter:g} of the largest logit | {most_adapter:.1e} |
| logits of the merged model in plain transformers, and of the adapter in plain PEFT | {merged:g} of the largest logit | {most_merged:.1e} |

PEFT computes the logits in float64: two right models in float32 are up to {most_float32:.1e} of the
largest logit apart by the order of their sums alone. The merged model is computed in float64, too.

Where experts stand in one tensor, each has an adapter here (`lora.experts: all`).

*Rows* says whether several documents share a row: layers that carry a state, such as linear
attention, would carry it from one document into the next. *GGUF* is the share of tokens that
llama.cpp chooses as the trained model does, on a float16 file, or why there is no verdict: the
converter and llama.cpp are those of the extra `export`. Types that have a tokenizer of
SentencePiece have a small one here, the others that of SmolLM2; the converter knows a tokenizer of
Qwen 2 to 3.5 only by its real vocabulary, which is not at hand.

| type | rows | outcome | GGUF f16 |
| --- | --- | --- | --- |
"""  # noqa: E501


def _told(found: Mapping[str, Any]) -> str:
    if wrong := verdict(Outcome.of(found)):
        return f"**not as it should be**: {wrong}"
    return f"refused: {found['refused']}" if found["refused"] else "right"


def _row(name: str, found: Mapping[str, Any]) -> str:
    rows = "–" if found["refused"] else "shared" if found["packed"] else "one document each"
    told = (found["gguf"] or "–").splitlines()[0].rstrip(":")
    gguf = re.sub(r"/\S*/", "", told.replace("|", "\\|"))  # folders of this machine
    return f"| {name} | {rows} | {_told(found)} | {gguf} |\n"


def write_page(path: Path, done: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the page of outcomes, by type."""
    right = [found for found in done.values() if found["gaps"].keys() == TOLERANCES.keys()]
    numbers = {name.replace(" ", "_"): bound for name, bound in TOLERANCES.items()}
    most = {
        f"most_{name.replace(' ', '_')}": max(found["gaps"][name] for found in right)
        for name in TOLERANCES
    }
    text = INTRODUCTION.format(
        **{name: version(name) for name in ("transformers", "peft", "torch")},
        **numbers, **most,
        most_float32=max(found["float32_gap"] for found in right),
        updates=UPDATES, right=sum(_told(found) == "right" for found in done.values()),
        refused=sum(_told(found).startswith("refused") for found in done.values()),
        gguf=sum(found["gguf"].startswith("top-1") for found in right),
    )  # fmt: skip
    path.write_text(text + "".join(_row(name, done[name]) for name in SWEPT))
