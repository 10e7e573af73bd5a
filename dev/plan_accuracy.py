"""The plan against a GPU: predicted and measured memory of the same training step.

    python dev/plan_accuracy.py predict > dev/plan-accuracy-predicted.json    # on any machine
    python dev/plan_accuracy.py predict lora,dora                             # these methods alone
    python dev/plan_accuracy.py measure dev/plan-accuracy-predicted.json      # with a GPU
    python dev/plan_accuracy.py table measured.jsonl                          # as Markdown

Weights are random and made on the device: memory does not depend on their values. Each case runs in
a process of its own, three updates.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from strixft.catalog.hosts import HOSTS
from strixft.catalog.models import MODELS
from strixft.recipe.schema import Dataset, Recipe, Train

HOST = HOSTS["h200-141"]
UPDATES = 3
GB = 1e9


@dataclass(frozen=True)
class Case:
    """One training step: rows × length, and how many layers are recomputed."""

    model: str
    method: str
    rows: int
    length: int
    recomputed: int

    @property
    def trained(self) -> int:
        return self.rows * self.length // 2

    def recipe(self) -> Recipe:
        """Rows that are padded, and layers that are not compiled."""
        return Recipe(
            model=self.model,
            method=self.method,
            dataset=Dataset(source="none", packing=False),
            train=Train(compile="none"),
        )

    def config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.for_model(**MODELS[self.model].config)


LLAMA_1B, LLAMA_8B, LLAMA_70B = (
    f"meta-llama/Llama-3.{name}-Instruct" for name in ("2-1B", "1-8B", "3-70B")
)
GEMMA_4B, GEMMA_12B = "google/gemma-3-4b-it", "google/gemma-3-12b-it"
MISTRAL_24B = "mistralai/Mistral-Small-24B-Instruct-2501"

CASES = [
    Case(LLAMA_1B, "full", 4, 1024, 0),
    Case(LLAMA_1B, "full", 2, 2048, 16),
    Case(LLAMA_1B, "lora", 8, 512, 0),
    Case(LLAMA_8B, "qlora", 1, 2048, 0),
    Case(LLAMA_8B, "qlora", 4, 1024, 32),
    Case(LLAMA_8B, "qlora", 1, 8192, 0),
    Case(LLAMA_8B, "lora", 1, 4096, 0),
    Case(LLAMA_8B, "lora", 2, 1024, 16),
    Case(LLAMA_70B, "qlora", 1, 2048, 80),
    Case(LLAMA_70B, "qlora", 1, 2048, 24),
    Case(LLAMA_70B, "qlora", 1, 1024, 0),
    Case("Qwen/Qwen3-14B", "qlora", 1, 4096, 40),
    Case("Qwen/Qwen3-14B", "lora", 2, 2048, 20),
    Case("Qwen/Qwen3-32B", "qlora", 1, 2048, 0),
    Case(GEMMA_4B, "lora", 1, 2048, 0),
    Case(GEMMA_4B, "full", 1, 1024, 34),
    Case(GEMMA_12B, "lora", 1, 2048, 0),
    Case(GEMMA_12B, "qlora", 4, 512, 48),
    Case(MISTRAL_24B, "qlora", 1, 4096, 20),
    # a second set, predicted after what the first one taught
    Case(LLAMA_1B, "full", 1, 4096, 8),
    Case("Qwen/Qwen3-4B", "full", 1, 1024, 36),
    Case("google/gemma-3-1b-it", "full", 4, 512, 26),
    Case("Qwen/Qwen3-8B", "lora", 2, 2048, 9),
    Case("Qwen/Qwen3-8B", "dora", 1, 2048, 36),
    Case(MISTRAL_24B, "lora", 1, 2048, 40),
    # 8-bit bases, predicted with the base of LoRA in bf16
    Case(LLAMA_8B, "int8-lora", 2, 2048, 0),
    Case("Qwen/Qwen3-14B", "int8-lora", 1, 2048, 40),
]


def predict(case: Case) -> dict[str, Any]:
    """The plan's figures, and how long they took."""
    from strixft.data.batches import RowShape
    from strixft.plan.dry_run import dry_run
    from strixft.probe.job import Job

    began = time.monotonic()
    shape = RowShape(case.rows, case.length, case.trained)
    found = dry_run(Job.of(case.recipe(), case.config(), HOST), shape, case.recomputed)
    return {
        **asdict(case),
        "predicted_bytes": found.peak_bytes,
        "predicted_reserved_bytes": found.reserved_bytes,
        "predicted_s": found.seconds_per_update,
        "parts": found.parts,
        "planning_s": round(time.monotonic() - began, 2),
    }


def measure(row: dict[str, Any]) -> dict[str, Any]:
    """The same step on the GPU."""
    import torch

    from strixft.data.batches import shape_batch
    from strixft.model.load import random_model
    from strixft.probe.job import Job
    from strixft.step.update import TrainingStep

    case = Case(**{name: row[name] for name in Case.__dataclass_fields__})
    model = random_model(case.recipe(), case.config(), "cuda", torch.bfloat16)
    options = Job.of(case.recipe(), case.config(), HOST).options_with(case.recomputed)
    step = TrainingStep(model, case.recipe().train, options)
    batch = shape_batch(case.rows, case.length, case.trained, "cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(UPDATES):
        began = time.monotonic()
        step.update([batch])
        torch.cuda.synchronize()
        seconds.append(round(time.monotonic() - began, 3))
    return {
        **row,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "measured_bytes": torch.cuda.max_memory_allocated(),
        "measured_reserved_bytes": torch.cuda.max_memory_reserved(),
        "measured_s": seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: both memories, predicted and measured, in GB (10⁹ bytes)."""
    lines = [
        "| model | method | rows × tokens | recomputed | allocated: predicted | measured | error"
        " | reserved: predicted | measured | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [row["model"].partition("/")[2], row["method"]]
        cells += [f"{row['rows']} × {row['length']}", str(row["recomputed"])]
        for kind in ("", "reserved_"):
            planned, real = row[f"predicted_{kind}bytes"], row[f"measured_{kind}bytes"]
            cells += [f"{planned / GB:.3f}", f"{real / GB:.3f}", f"{planned / real - 1:+.2%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(act: str, argument: str = "") -> None:
    """Do one of the acts above."""
    if act == "predict":
        methods = argument.split(",") if argument else [case.method for case in CASES]
        print(json.dumps([predict(case) for case in CASES if case.method in methods], indent=1))
    elif act == "one":
        print(json.dumps(measure(json.loads(argument))), flush=True)
    elif act == "measure":
        for row in json.loads(Path(argument).read_text()):
            subprocess.run([sys.executable, __file__, "one", json.dumps(row)], check=False)
    else:
        print(table([json.loads(line) for line in Path(argument).read_text().splitlines()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
