"""Every stage of one tiny model, beside plain transformers and PEFT.

All rows are one update, so that the losses need no order of rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import strixft
from strixft.export import parity
from strixft.export.result import Exported
from strixft.plan.result import Plan
from strixft.run.folder import Run
from strixft.run.open import open_run
from strixft.support.errors import StrixftError
from sweep.inputs import write_folder, write_recipe
from sweep.models import REFUSED
from sweep.reference import logit_gaps, tensors_in, training_gaps

TOLERANCES = {"first loss": 1e-4, "losses": 1e-3, "adapter": 1e-5, "merged": 1e-5}
"""Of a loss in nats; of all losses as a share; of logits as a share of the largest. Logits are
compared with those of float64: in float32 right models are 1.4e-5 apart by the order of sums."""

OUTSIDE = re.compile(r"vision|visual|audio|projector|mtp\.|(?<!un)embed")
"""Names of tensors that an adapter leaves as they are."""

PROMPTS = 8
"""Prompts whose answers are compared with llama.cpp's; the product takes more."""


@dataclass
class Outcome:
    """What became of one type."""

    name: str
    refused: str = ""
    """The error's sentence, if a stage refused."""
    stage: str = ""
    """The last stage that began."""
    gaps: dict[str, float] = field(default_factory=dict)
    float32_gap: float = 0.0
    """What the export's own comparison of the merged model found."""
    packed: bool = False
    """Several documents shared a row."""
    touched: list[str] = field(default_factory=list)
    """Tensors of a tower, or of a head for more tokens, that the merge changed."""
    gguf: str = ""
    """Parity with llama.cpp, or why there is none; empty if it was not tried."""

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Outcome:
        """Read one back."""
        return cls(**{one.name: found[one.name] for one in fields(cls)})

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
    if found.touched:
        return f"the merge changed {found.touched[0]}"
    return f"too far from transformers and PEFT: {found.far}" if found.far else None


def sweep(name: str, sides: dict[str, Any], folder: Path, *, gguf: bool = False) -> Outcome:
    """Take a tiny model through all stages."""
    found, model = Outcome(name), folder / "model"
    write_folder(model, name, sides)
    run = open_run(write_recipe(folder, model), folder / "run")
    try:
        for stage in ("prepare", "plan", "train", "evaluate"):
            found.stage = stage
            getattr(strixft, f"{stage}_recipe")(run)
        found.packed = run.require(Plan).figures["choice"]["packed"] is not None
        found.gaps |= training_gaps(run)
        found.stage = "export"
        exported, found.gguf = _export(run, gguf=gguf)
        found.float32_gap = exported.figures["made"]["merged"]["check"]["max_difference"]
        found.gaps |= logit_gaps(run)
        found.touched = touched(run)
    except StrixftError as error:
        found.refused = error.problem
    return found


def touched(run: Run) -> list[str]:
    """The tensors outside the decoder's layers that the merged checkpoint has otherwise."""
    base = tensors_in(Path(run.recipe.model))
    merged = tensors_in(run.folder / "export" / "merged")
    same = base.keys() & merged.keys()
    changed = [name for name in same if not torch.equal(base[name], merged[name])]
    return sorted({*filter(OUTSIDE.search, changed), *(base.keys() ^ merged.keys())})


def _export(run: Run, *, gguf: bool) -> tuple[Exported, str]:
    """The export, and the parity with llama.cpp or the sentence of its refusal."""
    told = ""
    if gguf:
        try:
            with patch.object(parity, "PROMPTS", PROMPTS):
                exported = strixft.export_recipe(run, ("gguf",))
            exported.require_parity()
            return exported, f"top-1 {exported.figures['parity']['f16']['top1']:.3f}"
        except StrixftError as error:
            told = error.problem
    return strixft.export_recipe(run, ("merged",)), told
