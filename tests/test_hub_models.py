"""Each answer in docs/hub-models.md is what strixft says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, WriteRecipe
from sweep.models import SWEPT
from transformers import AutoConfig

from strixft.catalog.methods import METHODS
from strixft.model.config import check_raw
from strixft.model.load import require_stored
from strixft.model.source import load_config
from strixft.recipe.load import load_recipe
from strixft.support.errors import RecipeError

PAGES = {
    name: (REPOSITORY / "docs" / f"{name}.md").read_text() for name in ("hub-models", "models")
}

ROWS = re.findall(r"^\| `(.+?)` \| (.+?) \| (.+?) \| (.+) \|$", PAGES["hub-models"], re.MULTILINE)

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

OWN_CODE = {"AutoConfig": "its_own.Config", "AutoModelForCausalLM": "its_own.Model"}


def _raw(model_type: str, stored: str) -> dict[str, Any]:
    """A configuration like the hub's; a type that transformers does not know brings its code."""
    own = {"model_type": model_type, "auto_map": OWN_CODE}
    kept = NF4 if stored == "nf4" else {"quant_method": stored}
    quantised = {} if stored.startswith("16 bits") else {"quantization_config": kept}
    return {**SWEPT.get(model_type, own), **quantised}


def _ask(
    name: str, raw: dict[str, Any], stored: str, folder: Path, write_recipe: WriteRecipe
) -> None:
    """Read a model's configuration, from the part of it, or of its name, that is refused."""
    if stored == "gguf":
        load_config(load_recipe(write_recipe(model=name, offline=True)))
    elif "code" in stored:
        (folder / "config.json").write_text(json.dumps(raw))
        load_config(load_recipe(write_recipe(model=str(folder))))
    elif stored == "nf4":
        require_stored(AutoConfig.for_model(**raw), METHODS["lora"])
    else:
        check_raw(raw, name)


def _refusal(
    name: str, raw: dict[str, Any], stored: str, folder: Path, write_recipe: WriteRecipe
) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        _ask(name, raw, stored, folder, write_recipe)
    return caught.value


def test_there_are_fifty_models() -> None:
    assert len(ROWS) >= 50
    assert len({name for name, *_ in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("name", "model_type", "stored", "answer"), ROWS, ids=[r[0] for r in ROWS])
def test_the_answer_is_true(
    name: str, model_type: str, stored: str, answer: str, tmp_path: Path, write_recipe: WriteRecipe
) -> None:
    if answer.startswith("right"):
        (outcome,) = re.findall(
            rf"^\| {model_type} \| .+? \| (.+?) \|", PAGES["models"], re.MULTILINE
        )
        assert outcome == "right"
        check_raw(_raw(model_type, stored if stored != "nf4" else "bitsandbytes"), name)
    if recipe := re.search(r"recipe `(.+?)`", answer):
        assert load_recipe(recipe[1]).model == name
    if "refused: " in answer:
        refused = _refusal(name, _raw(model_type, stored), stored, tmp_path, write_recipe)
        words, _, typed = answer.partition("refused: ")[2].partition("; type ")
        assert words in refused.problem
        assert refused.fix
        assert typed in refused.fix
        method = re.search(r"`(method: \w+)`", answer)
        assert method is None or refused.fix == method[1]
