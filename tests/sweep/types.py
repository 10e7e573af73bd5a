"""Every causal type that transformers knows, planned from its class's own sizes.

`python -m sweep.types [NAME …]` in `tests/`: a plan or one sentence each, never another error. Four
layers each; a quarter of an hour on two cores, so it is no part of `make sweep`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers",
          "decoder_layers")  # fmt: skip
KEPT = 4


def few_layers(sides: dict[str, Any]) -> dict[str, Any]:
    """A configuration with few layers; lists of all layers follow."""
    count = next((sides[name] for name in LAYERS if isinstance(sides.get(name), int)), 0)
    small = dict(sides)
    for name, value in sides.items():
        if isinstance(value, dict):
            small[name] = few_layers(value)
        elif name in LAYERS and isinstance(value, int):
            small[name] = min(value, KEPT)
        elif isinstance(value, list) and len(value) == count > KEPT:
            small[name] = [*value[: KEPT - 1], value[-1]]
    return small


def outcome(name: str, folder: Path) -> str:
    """A plan's size, or the sentence of a refusal."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from strixft.plan.result import plan_figures
    from strixft.recipe.load import load_recipe
    from strixft.support.errors import StrixftError

    try:
        sides = few_layers(CONFIG_MAPPING[name]().to_dict()) | {"model_type": name}
    except Exception as error:  # the class itself refuses its defaults
        return f"has no defaults: {error!r:.100}"
    (folder / "config.json").write_text(json.dumps(sides, default=str))
    recipe = {
        "model": str(folder), "method": "lora", "offline": True, "train": {"compile": "none"},
        "dataset": {"source": "rows.jsonl", "max_length": 48},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    try:
        figures = plan_figures(load_recipe(str(folder / "recipe.yaml")), "strix-halo-128")
    except StrixftError as error:
        return f"refused: {error.problem}"
    return f"planned: {figures['reserved_bytes'] / 2**30:.1f} GiB"


def main() -> None:
    """Plan all types, or those that are named; another error ends it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    for name in sys.argv[1:] or CAUSAL:
        with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
            print(f"{name}: {outcome(name, Path(folder))}", flush=True)


if __name__ == "__main__":
    main()
