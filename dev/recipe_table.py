"""Writes `docs/recipes.md` and `strixft/catalog/recipe_figures.csv`: what each recipe needs.

python dev/recipe_table.py strix-halo-128 > docs/recipes.md
"""

from __future__ import annotations

import csv
import sys
from dataclasses import fields
from typing import Any

import torch

from strixft.catalog.methods import METHODS
from strixft.catalog.recipe_figures import FILE, RecipeFigures
from strixft.model.config import is_in_mxfp4
from strixft.model.load import shape_base
from strixft.model.packed_experts import packed_in
from strixft.plan.choose import DataShape, Planner
from strixft.plan.result import checked_job, plan_figures
from strixft.recipe.find import find_recipes
from strixft.recipe.load import load_recipe
from strixft.recipe.schema import Recipe
from strixft.support.units import format_gib, format_number

HEADER = """# The recipes

Each file in `recipes/` is one run; it holds only what differs from the default, with its reason.
Copy one, set `dataset.source`, and run it.

The figures are **predicted** for `{host}`, a budget of {budget}: rows of `max_length` without
a gap, and every operator at the rate that the host's row in `strixft/catalog/hosts.py` names. Of
plans that are as fast but for 0.5 % the table has the smallest ([plan.md](plan.md)). Beside a
GPU the plan of now is within 0.6 % of allocated and 4.6 % of reserved memory
([plan-accuracy.md](plan-accuracy.md)). Time has not
been measured on this host; work that is not large matrix products will be slower than this.

Qwen 3.5 and 3.6 are trained in bf16: Unsloth advises against 4-bit for the whole 3.5 line, whose
weights lose more by it than usual
([unsloth.ai/docs](https://unsloth.ai/docs/models/qwen3.5/fine-tune)). Their linear attention
is planned as torch computes it;
flash-linear-attention, where it is installed and right, is faster. Vision-language checkpoints
(Qwen 3.5, Gemma 3 and 4, Ministral 3, Muse Glimmer) are trained as text. Of mixtures of experts
attention and shared experts are adapted ([mixtures.md](mixtures.md)). A recipe that says
`reconstructed` was planned from a `config.json` that was put together:
`strixft/catalog/configs/README.md` has the sources.

    python dev/recipe_table.py {host} > docs/recipes.md

| recipe | allocated | reserved | rows × tokens | recomputed | tokens/s | hours per million tokens |
| --- | --- | --- | --- | --- | --- | --- |"""


def row(name: str, figures: dict[str, Any]) -> str:
    choice, rate = figures["choice"], figures["tok_per_s"]
    cells = [
        f"`{name}`",
        format_gib(figures["peak_bytes"]),
        format_gib(figures["reserved_bytes"]),
        f"{choice['micro_batch_rows']} × {choice['max_length']}",
        f"{choice['recomputed_layers']} of {choice['num_layers']}",
        format_number(rate, 0),
        format_number(1e6 / rate / 3600, 1),
    ]
    return f"| {' | '.join(cells)} |"


def short(recipe: Recipe, host: str, figures: dict[str, Any]) -> RecipeFigures:
    """Return the figures that lists show."""
    job = checked_job(recipe, host)
    data = DataShape.of(recipe, None, packed=job.options.backend.packed)
    planner = Planner(job, data)
    least = planner.dry_run(1, planner.num_layers)
    as_stored = METHODS["qlora" if is_in_mxfp4(job.config) else "full"]
    whole = shape_base(job.config, as_stored, torch.bfloat16)
    packed = (tensor for part in packed_in(whole).values() for tensor in part.tensors)
    return RecipeFigures(
        need_bytes=figures["reserved_bytes"] + figures["outside_bytes"],
        least_bytes=planner.need_bytes(least),
        tok_per_s=round(figures["tok_per_s"], 2),
        weights_bytes=sum(2 * weight.numel() for weight in whole.parameters())
        + sum(tensor.nbytes for tensor in packed),
    )


def main(host: str) -> None:
    """Print the page, and write the figures that lists show."""
    lines, found, figures = [], {}, {}
    for name in sorted(find_recipes()):
        if name != "demo":
            recipe = load_recipe(name)
            figures = plan_figures(recipe, host)
            lines.append(row(name, figures))
            found[name] = short(recipe, host, figures)
    budget = format_gib(figures["host"]["budget_bytes"])
    print("\n".join([HEADER.format(host=host, budget=budget), *lines]))
    names = [field.name for field in fields(RecipeFigures)]
    with FILE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["recipe", *names])
        writer.writerows(
            [name, *(getattr(one, key) for key in names)] for name, one in found.items()
        )


if __name__ == "__main__":
    main(sys.argv[1])
