"""Find recipes: shipped ones by name, others by path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from strixft.support.errors import RecipeError
from strixft.support.tables import did_you_mean

HERE = Path(__file__).resolve().parent.parent


def workspace(start: Path | None = None) -> Path:
    """Return the nearest folder upwards that holds `recipes/`, or the start itself."""
    start = (start or Path.cwd()).resolve()
    upwards = (start, *start.parents)
    return next((folder for folder in upwards if (folder / "recipes").is_dir()), start)


def shipped(kind: Literal["recipes", "notebooks"]) -> Path:
    """Return the folder of the recipes or notebooks that come with the package or repository."""
    return next(folder for folder in (HERE / kind, HERE.parent / kind) if folder.is_dir())


def find_recipes() -> dict[str, Path]:
    """Return recipes by name; those of the workspace replace shipped ones."""
    folders = (shipped("recipes"), workspace() / "recipes")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def describe(path: Path) -> list[str]:
    """Return model, method and longest row of a recipe's file."""
    import yaml

    from strixft.recipe.schema import Dataset, Recipe

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        length = found["dataset"].get("max_length", Dataset.model_fields["max_length"].default)
        method = found.get("method", Recipe.model_fields["method"].default)
        return [str(found["model"]), str(method), str(length)]
    except (
        OSError,
        ValueError,
        AttributeError,
        KeyError,
        TypeError,
        yaml.YAMLError,
    ):  # one file should not hide others
        return ["damaged", "–", "–"]


HEADER = ("recipe", "model", "method", "tokens in a row")


def find_recipe(name_or_path: str | Path) -> Path:
    """Return the recipe file for a name or a path.

    Raises:
        RecipeError: There is no such recipe.
    """
    given = Path(os.path.expanduser(name_or_path))
    for path in (given, workspace() / given, shipped("recipes").parent / given):
        if os.path.isfile(path):  # Path.is_file raises if a name is too long
            return path.resolve()
    known = find_recipes()
    if str(name_or_path) in known:
        return known[str(name_or_path)].resolve()
    if str(name_or_path) and os.path.isdir(given):
        raise RecipeError(
            f"{given} is a folder, not a recipe", fix="name a file   strixft recipe   lists them"
        )
    raise RecipeError(
        f"there is no recipe {str(name_or_path)!r} (looked from {Path.cwd()})",
        fix=f"{did_you_mean(given.stem, known)}   strixft recipe   lists them",
    )
