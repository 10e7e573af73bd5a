"""Space for the model and the run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from strixft.doctor.finding import Finding, Fix
from strixft.doctor.view import HostView
from strixft.recipe import workspace
from strixft.units import GIB, format_gib

SPARE = 10 * GIB
"""Prepared data, checkpoints of an adapter, the report."""
SOURCE = "size: parameters in the model's name × 2 bytes (derived)"


def parameters_by_name(model: str) -> float | None:
    """Parameters of a model as its name says.

    >>> parameters_by_name("meta-llama/Llama-3.3-70B-Instruct"), parameters_by_name("my/model")
    (70000000000.0, None)
    """
    found = re.search(r"(?<![\d.])(\d+(?:\.\d+)?)(B|M)(?![A-Za-z])", model, re.IGNORECASE)
    if found is None:
        return None
    return float(found[1]) * (1e9 if found[2].upper() == "B" else 1e6)


def _cache(view: HostView) -> Path:
    home = view.environ.get("HF_HOME") or f"{view.home}/.cache/huggingface"
    return Path(view.environ.get("HF_HUB_CACHE") or f"{home}/hub")


def _is_here(view: HostView, model: str) -> bool:
    """A folder, the embedded model, or in the hub's cache already."""
    cached = _cache(view) / f"models--{model.replace('/', '--')}" / "snapshots"
    return model.startswith("embedded:") or Path(model).expanduser().is_dir() or cached.is_dir()


def _needed(view: HostView) -> dict[Path, int]:
    """Bytes by folder."""
    runs = workspace() / "runs"
    needed = {runs: SPARE}
    if view.recipe is None:
        return needed
    size = round(2 * (parameters_by_name(view.recipe.model) or 0))
    if view.recipe.method == "full":
        needed[runs] += 5 * size  # weights, and a checkpoint with its optimiser state
    if not _is_here(view, view.recipe.model):
        needed[_cache(view)] = size + SPARE
    return needed


def check_disk(view: HostView) -> Iterator[Finding]:
    """Free space where a run writes and where models are kept."""
    for folder, needed in _needed(view).items():
        free = view.free_bytes(folder)
        if free is None:
            continue
        saw = f"{format_gib(free)} free for {folder}, {format_gib(needed)} asked for"
        why = "a run that finds the disk full stops with half a checkpoint"
        if free >= needed:
            yield Finding(status="ok", saw=saw, why=why, source=SOURCE)
        else:
            yield Finding(
                status="warn" if view.recipe is None else "fail",
                saw=saw,
                why=why,
                fix=Fix(
                    "make room, or use another disk: --run-dir for runs, HF_HOME for models",
                    (
                        f"du -xh --max-depth=2 {shlex.quote(str(folder.parent))} | sort -h | tail",
                        "hf cache ls",
                    ),
                ),
                source=SOURCE,
            )
