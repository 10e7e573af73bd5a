"""What cannot be exported is said before training, from names and shapes alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import WriteRecipe
from safetensors.torch import load_file, save_file

from strixft.model import stream
from strixft.plan.exportable import require_exportable
from strixft.plan.result import Plan, plan_recipe
from strixft.prepare.stage import prepare_recipe
from strixft.recipe.load import load_recipe
from strixft.recipe.schema import Recipe
from strixft.run.open import open_run
from strixft.support.errors import RecipeError


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


def recipe_on(base: Path, write_recipe: WriteRecipe, **sections: object) -> Recipe:
    return load_recipe(write_recipe("it", model=str(base), **sections))


def change(base: Path, name: str, weight: torch.Tensor | None) -> None:
    weights = load_file(base / "model.safetensors")
    del weights[name]
    more = {} if weight is None else {name: weight}
    save_file({**weights, **more}, base / "model.safetensors", {"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "int8-lora", "full"])
def test_a_whole_base_can_be_merged_into(
    method: str, base: Path, write_recipe: WriteRecipe
) -> None:
    recipe = recipe_on(base, write_recipe, method=method, export={"to": ["merged"]})
    assert require_exportable(recipe) == []


@pytest.mark.parametrize(
    ("weight", "told"),
    [
        (None, "nothing in the files of the base becomes model.layers.1.mlp.up_proj.weight"),
        (torch.zeros(8, 8), r"is \[160, 64\] in the model, \[8, 8\] in the files"),
        (torch.zeros(160, 64, dtype=torch.float8_e4m3fn), "is stored as F8_E4M3"),
    ],
)
def test_what_a_merge_could_not_do_is_refused_where_it_is_asked_for(
    weight: torch.Tensor | None, told: str, base: Path, write_recipe: WriteRecipe
) -> None:
    change(base, UP, weight)
    asked = recipe_on(base, write_recipe, export={"to": ["merged"]})
    with pytest.raises(RecipeError, match=told) as caught:
        require_exportable(asked)
    assert caught.value.fix.startswith("--set 'export.to=[gguf-lora]'")
    [warning] = require_exportable(recipe_on(base, write_recipe))
    assert warning.startswith(f"what is trained could not be merged into {base}: nothing in")


def test_no_weight_is_read(
    base: Path, write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose numbers are gone has its header still."""
    path = base / "model.safetensors"
    size = path.stat().st_size
    with path.open("rb+") as file:
        first = int.from_bytes(file.read(8), "little") + 8
        file.truncate(first)
        file.truncate(size)
    monkeypatch.setattr(stream.Shard, "read", lambda *_: pytest.fail("a weight was read"))
    assert require_exportable(recipe_on(base, write_recipe)) == []


def test_files_that_are_not_here_are_named(base: Path, write_recipe: WriteRecipe) -> None:
    (base / "model.safetensors").unlink()
    [warning] = require_exportable(recipe_on(base, write_recipe))
    assert "whether it can be merged is not known" in warning


def test_pickled_weights_are_refused_at_the_plan(base: Path, write_recipe: WriteRecipe) -> None:
    (base / "model.safetensors").rename(base / "consolidated.safetensors")
    (base / "pytorch_model.bin").write_bytes(b"no weights")
    with pytest.raises(RecipeError, match=r"pytorch_model\.bin is a pickle"):
        require_exportable(recipe_on(base, write_recipe))


def test_a_converter_that_refuses_is_quoted_before_training(
    base: Path, write_recipe: WriteRecipe
) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(RecipeError, match="NoSuchModel") as caught:
        require_exportable(recipe_on(base, write_recipe, export={"to": ["ollama"]}))
    assert caught.value.fix.startswith("--set 'export.to=[merged]'; or a newer llama.cpp")
    assert require_exportable(recipe_on(base, write_recipe, export={"to": ["vllm"]})) == []


def test_the_plan_says_it(base: Path, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    change(base, UP, None)
    run = open_run(write_recipe("it", model=str(base)), tmp_path / "run")
    prepare_recipe(run)
    plan: Plan = plan_recipe(run)
    assert any("could not be merged" in warning for warning in plan.figures["warnings"])
    asked = write_recipe("asked", model=str(base), export={"to": ["merged"]})
    other = open_run(asked, tmp_path / "other")
    prepare_recipe(other)
    with pytest.raises(RecipeError, match="could not be merged"):
        plan_recipe(other)
    assert not other.is_done("plan")
