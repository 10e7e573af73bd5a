"""The plan of compiled layers against a GPU, and the planner's choice beside its neighbours.

    python dev/plan_compiled.py predict > dev/plan-compiled-predicted.json    # on any machine
    python dev/plan_compiled.py measure > measured.jsonl    # with a GPU; `measure 8B`: of 8B only
    python dev/plan_compiled.py table measured.jsonl                          # as Markdown

What is measured is `strixft bench train`, capped at 120 GB, each model in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strixft.bench.train import Trial, bench_job
from strixft.catalog.hosts import HOSTS, Budget

PREDICTED = Path(__file__).with_name("plan-compiled-predicted.json")
BUDGET_GB, LENGTH = 120.0, 2048


@dataclass(frozen=True)
class Group:
    """One model: the planner's choice, and plans near it."""

    model: str
    method: str
    tokens: int
    """Trained tokens of an update."""
    updates: int
    neighbours: int = 0


GROUPS = [
    Group("meta-llama/Llama-3.1-8B-Instruct", "qlora", 32768, 3, neighbours=6),
    Group("meta-llama/Llama-3.3-70B-Instruct", "qlora", 8192, 3, neighbours=7),
    Group("meta-llama/Llama-3.1-8B-Instruct", "lora", 16384, 5),
    Group("meta-llama/Llama-3.2-1B-Instruct", "full", 65536, 5),
    Group("Qwen/Qwen3-14B", "qlora", 16384, 3),
    Group("google/gemma-3-12b-it", "lora", 16384, 3),
    Group("mistralai/Mistral-Small-24B-Instruct-2501", "lora", 8192, 3),
    Group("Qwen/Qwen3.5-9B", "lora", 16384, 4),
    Group("google/gemma-4-31B-it", "qlora", 16384, 4),
]


def predict(group: Group) -> list[dict[str, Any]]:
    """The choice, then its neighbours."""
    host, limit = HOSTS["h200-141"], Budget(int(BUDGET_GB * 1e9), "--budget-gb")
    job = bench_job(group.model, group.method, LENGTH, host, tokens_per_update=group.tokens)
    bench = Trial(job, limit, group.updates)
    return [
        {
            "model": group.model,
            "method": group.method,
            "rows×tokens": f"{run.shape.rows}×{run.shape.length}",
            "recomputed_layers": run.recomputed_layers,
            "peak_gb": run.peak_bytes / 1e9,
            "reserved_gb": run.reserved_bytes / 1e9,
            "tok_per_s": bench.planned_tok_per_s(run),
        }
        for run in bench.plans(group.neighbours)
    ]


def measure(group: Group) -> None:
    """Print one JSON document for each plan."""
    command = ["bench", "train", "--no-save", "--json", "--budget-gb", f"{BUDGET_GB}"]
    for name, value in vars(group).items():
        command += [f"--{name}", f"{value}"]
    done = subprocess.run(
        [sys.executable, "-m", "strixft", *command], check=False, stdout=subprocess.PIPE, text=True
    )
    for row in json.loads(done.stdout)["rows"] if done.returncode == 0 else []:
        print(json.dumps(row), flush=True)


def _cells(predicted: dict[str, Any], row: dict[str, Any], fastest: float) -> list[str]:
    cells = [row["model"].partition("/")[2], row["method"], row["rows×tokens"]]
    cells.append(f"{row['recomputed_layers']}")
    for name in ("peak_gb", "reserved_gb"):
        cells += [f"{predicted[name]:.2f}", f"{row[name]:.2f}"]
        cells.append(f"{predicted[name] / row[name] - 1:+.1%}")
    cells += [f"{predicted['tok_per_s']:,.0f}", f"{row['tok_per_s']:,.0f}"]
    return [
        *cells,
        f"{predicted['tok_per_s'] / row['tok_per_s'] - 1:+.1%}",
        f"{row['tok_per_s'] / fastest:.3f}",
    ]


def _name(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("model", "method", "rows×tokens", "recomputed_layers"))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what was predicted, what was measured, and the share of the fastest plan."""
    predicted = {_name(row): row for row in json.loads(PREDICTED.read_text(encoding="utf-8"))}
    lines = [
        "| model | method | rows × tokens | recomputed | allocated GB: predicted | measured | error"
        " | reserved GB: predicted | measured | error | tokens/s: predicted | measured | error"
        " | of the fastest |",
        "|" + " --- |" * 14,
    ]
    for row in rows:
        same = [r["tok_per_s"] for r in rows if _name(r)[:2] == _name(row)[:2]]
        if _name(row) in predicted:
            lines.append(f"| {' | '.join(_cells(predicted[_name(row)], row, max(same)))} |")
    return "\n".join(lines)


def main(act: str, argument: str = "") -> None:
    """Do one of the acts above."""
    if act == "predict":
        print(json.dumps([row for group in GROUPS for row in predict(group)], indent=1))
    elif act == "measure":
        for group in GROUPS:
            if argument in group.model:
                measure(group)
    else:
        print(table([json.loads(line) for line in Path(argument).read_text().splitlines()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
