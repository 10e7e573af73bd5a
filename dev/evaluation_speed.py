"""How long the evaluation of a run takes, and what batches gain over one row at a time.

    python dev/evaluation_speed.py RUN [TURNS]

RUN is a trained run, such as runs/demo. First what `strixft evaluate` does, loading included and
nothing written; then batches and single rows in turns, on the tuned model. On a machine that does
other things, the time of its processors says more than the clock.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from strixft.data.general import general_rows
from strixft.evaluate.generate import generate
from strixft.evaluate.losses import row_losses
from strixft.evaluate.stage import ANSWER_ROOM
from strixft.evaluate.variants import load_variants
from strixft.model.source import load_tokenizer
from strixft.plan.result import Plan
from strixft.prepare.stage import Prepared
from strixft.run.folder import Run
from strixft.run.open import find_run
from strixft.train.stage import ADAPTER

PHASES = ("loss", "general", "answers")


def phases(run: Run) -> dict[str, Any]:
    """Each phase in batches and, in `one`, row by row."""
    prepared = run.require(Prepared)
    rows = list(prepared.token_rows(run.recipe.dataset).validation)
    tokenizer, choice = load_tokenizer(run.recipe), run.require(Plan).figures["choice"]
    general, most = general_rows(tokenizer), choice["evaluated_rows"] * choice["max_length"]
    prompts = [row["input_ids"][: row["prompt_tokens"]] for row in rows]
    ends = prepared.ends(tokenizer)
    room = max(len(row["input_ids"]) - row["prompt_tokens"] for row in rows) + ANSWER_ROOM

    def work(model: Any, most_tokens: int) -> dict[str, Any]:
        return {
            "loss": lambda: row_losses(model, rows, most_tokens),
            "general": lambda: row_losses(model, general, most_tokens),
            "answers": lambda: generate(model, tokenizer, ends, prompts, room, most_tokens),
        }

    return {"rows": len(rows), "batches": lambda m: work(m, most), "one": lambda m: work(m, 1)}


def timed(work: Any) -> tuple[float, float]:
    """Seconds by the clock and of the processors."""
    began, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - used


def main(name: str, turns: int) -> None:
    """Print the seconds of each phase, then the gain of batches."""
    began = time.perf_counter()
    run = find_run(name)
    made = phases(run)
    print(f"{made['rows']} held-out rows, {torch.get_num_threads()} threads")
    for variant, model in load_variants(run.recipe, run.stage_folder("train") / ADAPTER):
        for phase, work in made["batches"](model).items():
            seconds, used = timed(work)
            print(f"{variant:6} {phase:8} {seconds:6.1f} s, {used:6.1f} s of cores", flush=True)
    print(f"in all {time.perf_counter() - began:.1f} s, {time.process_time():.1f} s of processors")
    for phase in PHASES:
        pairs = [
            (timed(made["one"](model)[phase]), timed(made["batches"](model)[phase]))
            for _ in range(turns)
        ]
        clock, used = (sum(p[0][i] for p in pairs) / sum(p[1][i] for p in pairs) for i in (0, 1))
        print(f"{phase:8} one by one: {clock:.2f} × by the clock, {used:.2f} × of processors")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1)
