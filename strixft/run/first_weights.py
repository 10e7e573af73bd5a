"""The adapter of an earlier run, where a recipe trains it on."""

from __future__ import annotations

from pathlib import Path

from strixft.catalog.methods import METHODS
from strixft.recipe.schema import Recipe
from strixft.run.folder import Result, read_recipe, resume_command
from strixft.support.errors import RecipeError, StageError
from strixft.support.text import typed

AGREE = ("r", "alpha", "rs", "target_modules", "experts", "layers", "modules_to_save")
"""Settings of `lora` that the weights of an adapter depend on; dropout may differ."""


def first_weights(recipe: Recipe) -> Result | None:
    """Return the training whose adapter a recipe begins with; None where it begins with a new one.

    Raises:
        RecipeError: The adapter is of another model, of another kind or size.
        StageError: The run is not trained, or its files have changed.
    """
    if recipe.init_from is None:
        return None
    folder = Path(recipe.init_from)
    before, done = read_recipe(folder), Result.load(folder / "train")
    kind, kind_before = (METHODS[one.method].adapter for one in (recipe, before))
    if kind == "none" or kind_before == "none":
        raise RecipeError(
            f"init_from: method {recipe.method} cannot train on what {before.method} made of"
            f" {before.model}: there is no adapter",
            fix=f"model: {folder}/export/merged   after: strixft export"
            f" {typed(folder / 'recipe.yaml')} --run-dir {typed(folder)} --to merged",
        )
    wanted = {f"lora.{name}": getattr(before.lora, name) for name in AGREE}
    wanted |= {"model": before.model}
    here = {f"lora.{name}": getattr(recipe.lora, name) for name in AGREE} | {"model": recipe.model}
    if kind != kind_before:
        wanted, here = {"method": before.method}, {"method": recipe.method}
    differ = {name: value for name, value in wanted.items() if here[name] != value}
    if differ:
        listed = "; ".join(f"{n} is {here[n]!r} here and {v!r} there" for n, v in differ.items())
        raise RecipeError(
            f"init_from: the adapter of {folder} is another one: {listed}",
            fix=" ".join(f"--set '{name}={value}'" for name, value in differ.items()),
            settings=differ,
        )
    if done is None:
        raise StageError(f"init_from: {folder} is not trained", fix=resume_command(folder))
    done.require_whole()
    return done
