"""`FAMILIES`: what is particular about a model family, keyed by `model_type` of its `config.json`.

An unknown family works: its loss goes through the model's own head, which is right for any
architecture and needs more memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from strixft.tables import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model family."""

    name: str
    head: Literal["linear", "model"]
    """`linear`: logits are hidden states times one matrix, capped by tanh where the config's
    `final_logit_softcapping` says so; the loss can be taken in chunks.
    `model`: the head does something else to its logits; ask the model for them."""
    source: str


_MODELING = "transformers 5.23.0, models/{0}/modeling_{0}.py"

FAMILIES: Table[Family] = Table(
    "model family",
    *(
        Family(name=name, head="linear", source=_MODELING.format(name.removesuffix("_text")))
        for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
    ),
)
UNKNOWN = Family(name="unknown", head="model", source="no row in FAMILIES")


def family_of(model_type: str) -> Family:
    """The row of a model type, or the one that is right for any."""
    known = model_type in FAMILIES
    return FAMILIES[model_type] if known else UNKNOWN
