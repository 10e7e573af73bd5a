"""Find recipes: shipped ones by name, others by path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from strixft.support.errors import RecipeError
from strixft.support.tables import did_you_mean

HERE = Path(__file__).resolve().parent.parent


def _parents(start: Path) -> Iterator[Path]:
    yield from (start, *start.parents)


def workspace(start: Path | None = None) -> Path:
    """The nearest folder upwards that holds `recipes/`, or the start itself."""
    start = (start or Path.cwd()).resolve()
    return next((folder for folder in _parents(start) if (folder / "recipes").is_dir()), start)


def shipped(kind: Literal["recipes", "notebooks"]) -> Path:
    """Folder of the recipes or notebooks that came with the package or its repository."""
    return next(folder for folder in (HERE / kind, HERE.parent / kind) if folder.is_dir())


def find_recipes() -> dict[str, Path]:
    """Recipes by name: those of the workspace first, then those that ship."""
    folders = (shipped("recipes"), workspace() / "recipes")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name_or_path: str | Path) -> Path:
    """The recipe file that a name or a path means.

    Raises:
        RecipeError: There is no such recipe.
    """
    given = Path(os.path.expanduser(name_or_path))
    for path in (given, workspace() / given, shipped("recipes").parent / given):
        if os.path.isfile(path):  # Path.is_file raises where a name is too long
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
