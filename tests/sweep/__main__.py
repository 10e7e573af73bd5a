"""Every architecture through every stage: `python -m sweep [NAME …]` in `tests/`; `make sweep`.

Outcomes are kept in a file, one a line, and a run goes on with the types that it lacks; the page is
written once no type is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"

INTRODUCTION = """# Model types

What a model is like is found out from the model ([plan.md](plan.md)), not read from a list of
families. This table is the proof: a tiny random model of each type, a wrapper with its tower as the
hub ships it, through prepare, plan, train, evaluate and export on a CPU, uncompiled. **Nothing here
ran on a gfx1151.**

    make sweep

*Right* means, beside transformers and PEFT alone (each document by itself, eager attention, a plain
loop of AdamW from the same first adapter):

| compared | at most |
| --- | --- |
| first loss | {first_loss:g} nats |
| all losses of {updates} updates | {losses:g} of the loss |
| logits of the adapter, loaded by plain PEFT | {adapter:g} of the largest logit |
| logits of the merged model, loaded by plain transformers | {merged:g} of the largest logit |

*Rows* says whether several documents share a row, or why not: layers that carry a state, such as
linear attention, would carry it from one document into the next. *GGUF* is the share of tokens that
llama.cpp chooses as the trained model does, on a float16 file, or why there is no verdict: the tiny
models have SmolLM2's tokenizer, where the converter wants another for some types. `–` was not
tried.

| type | rows | outcome | GGUF f16 |
| --- | --- | --- | --- |
"""


def row(name: str, found: dict[str, Any] | None) -> str:
    """A line of the table."""
    if found is None:
        return f"| {name} | – | not run yet | – |"
    outcome = f"refused: {found['refused']}" if found["refused"] else "right"
    rows = "–" if found["refused"] else "shared" if found["packed"] else "one document each"
    return f"| {name} | {rows} | {outcome} | {found['gguf'] or '–'} |"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The outcomes so far, by type; of several the last."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {found["name"]: found for found in map(json.loads, lines)}


def main() -> int:
    """Run what is missing, and write the page if all is there."""
    parser = argparse.ArgumentParser(prog="python -m sweep")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "sweep.jsonl")
    parser.add_argument("--gguf", action="store_true", help="convert to GGUF and compare too")
    parser.add_argument("--page", action="store_true", help="write it though types are missing")
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sweep.models import SWEPT
    from sweep.run import TOLERANCES, UPDATES, sweep, verdict

    done, bad = read(asked.results), 0
    missing = [] if asked.page else [name for name in SWEPT if name not in done]
    for name in asked.names or missing:
        began = time.process_time()
        with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
            found = sweep(name, SWEPT[name], Path(folder), gguf=asked.gguf)
        told = verdict(found)
        bad += told is not None
        print(
            f"{name}: {told or 'as it should be'} ({time.process_time() - began:.1f} s)", flush=True
        )
        with asked.results.open("a") as file:
            file.write(f"{json.dumps(asdict(found))}\n")
    done = read(asked.results)
    if asked.page or (done.keys() >= SWEPT.keys() and not bad):
        bounds = {key.replace(" ", "_"): most for key, most in TOLERANCES.items()}
        text = INTRODUCTION.format(updates=UPDATES, **bounds)
        PAGE.write_text(text + "".join(f"{row(name, done.get(name))}\n" for name in SWEPT))
    return bad


if __name__ == "__main__":
    sys.exit(main())
