"""The choices of a person who begins a run: model, data, settings; as a recipe and as a command."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from strixft.catalog.recipe_figures import RecipeFigures, recipe_figures
from strixft.formats.sources import is_hub
from strixft.model.files import model_folder, shard_paths
from strixft.recipe.find import describe, find_recipe, find_recipes, workspace
from strixft.recipe.load import load_recipe, typed_override
from strixft.recipe.schema import Recipe
from strixft.run.folder import Run
from strixft.run.manage import require_name
from strixft.run.open import free_name, open_run
from strixft.support.errors import DataError, RecipeError
from strixft.support.files import disk_full, free_bytes, is_full, write_text
from strixft.support.text import typed
from strixft.support.units import GIB

DATA = "data"
"""Folder of the workspace for uploaded files."""

DRAFTS = Path("runs") / ".drafts"
"""Folder of the workspace for runs that are looked at and not begun."""

ANY_MODEL = "llama-3.1-8b-lora"
"""Recipe that a model without one of its own begins with: it only has defaults."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A recipe in the list of models."""

    recipe: str
    model: str
    method: str
    figures: RecipeFigures | None
    """None for a recipe whose need is not known in advance."""

    @property
    def is_here(self) -> bool:
        """Return whether the weights are on this machine."""
        return is_on_disk(self.model)

    def label(self, budget_bytes: int | None) -> str:
        """Return three lines: the model, its need, and its time and download.

        Args:
            budget_bytes: What a run may use on this machine; None while it is not known.
        """
        name, figures = re.split("[/:]", self.model)[-1], self.figures
        if figures is None:
            where = "on this machine" if self.is_here else "not on this machine"
            return f"{name}\n{self.method} · recipe {self.recipe}\n{where}"
        need = figures.need_bytes / GIB
        fits = ""
        if budget_bytes is not None and figures.least_bytes > budget_bytes:
            fits = " · does not fit"
            need = figures.least_bytes / GIB
        elif budget_bytes is not None:
            fits, need = " · fits", min(need, budget_bytes / GIB)
        hours = 1e6 / figures.tok_per_s / 3600
        size = "on this machine" if self.is_here else f"{figures.weights_bytes / 1e9:.0f} GB to get"
        return f"{name}\n{self.method} · {need:.0f} GiB{fits}\n{hours:.1f} h per M tokens · {size}"


def offers() -> list[Offer]:
    """Return the recipes as a list of models: the demo first, then from small to large."""
    figures = recipe_figures()
    found = []
    for name, path in find_recipes().items():
        model, method, _ = describe(path)
        if model != "damaged":
            known = figures.get(name)
            found.append(Offer(recipe=name, model=model, method=method, figures=known))
    return sorted(found, key=lambda one: one.figures.weights_bytes if one.figures else 0)


def is_on_disk(model: str) -> bool:
    """Return whether a model's weights are on this machine, all of them."""
    if model.startswith("embedded:"):
        return True
    folder = model_folder(os.path.expanduser(model))
    paths = shard_paths(folder) if folder else []
    return bool(paths) and all(path.exists() for path in paths)


@dataclass
class Choices:
    """The choices so far."""

    recipe: str
    """Name or path of the recipe to begin with."""
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def recipe_name(self) -> str:
        """Name of the recipe."""
        return Path(self.recipe).name.removesuffix(".yaml")

    def load(self) -> Recipe:
        """Return the recipe with all that was chosen.

        Raises:
            RecipeError: The recipe has faults.
        """
        return load_recipe(self.recipe, self.overrides)

    def name(self) -> str:
        """Return a name for the run that is still free."""
        words = [self.recipe_name]
        if "model" in self.overrides:
            words = [str(self.overrides["model"]).rpartition("/")[2]]
        source = self.overrides.get("dataset.source")
        words += [_stem(source)] if isinstance(source, str) else []
        name = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(words)).strip("-.")[:80] or "run"
        folder = workspace() / "runs" / name
        return (free_name(folder) if folder.exists() else folder).name

    def has_data(self) -> bool:
        """Return whether the data are named, and are there."""
        return all(is_hub(one) or Path(one).exists() for one in self.load().dataset.sources())

    def command(self, name: str) -> str:
        """Return the command that does the same from a terminal."""
        words = [f"strixft run {typed(self.recipe)} --run-dir {typed(f'runs/{name}')}"]
        return " ".join([*words, *(typed_override(*row) for row in self.overrides.items())])

    def text(self) -> str:
        """Return the recipe as YAML, paths absolute, without settings that are the default."""
        settings = self.load().model_dump(mode="json", exclude_defaults=True)
        text: str = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        return text

    def save(self, name: str) -> Path:
        """Write the recipe below `recipes/` of the workspace; a file that is there stays.

        Args:
            name: Its name; another one is taken if it is not free.

        Raises:
            RecipeError: The folder cannot be written.
        """
        path = workspace() / "recipes" / f"{name}.yaml"
        number = 2
        while path.exists():
            path, number = path.with_name(f"{name}-{number}.yaml"), number + 1
        try:
            path.parent.mkdir(exist_ok=True)
            write_text(path, self.text())
        except OSError as error:
            raise RecipeError(
                f"{path} cannot be written: {error.strerror}",
                fix=f"ls -ld {typed(path.parent)}   shows owner and permissions",
            ) from error
        return path

    def draft(self, name: str) -> Run:
        """Open a run to look at, which becomes that run once it is begun.

        Raises:
            StrixftError: As `open_run`.
        """
        return open_run(find_recipe(self.recipe), workspace() / DRAFTS / name, self.overrides)

    def begin(self, name: str, draft: Run | None) -> Run:
        """Open the run, with what was prepared to look at it.

        Args:
            name: Its name below `runs/`.
            draft: The run that was looked at.

        Raises:
            StageError: The name cannot be used.
            RecipeError: A folder has it.
            StrixftError: As `open_run`.
        """
        require_name(name)
        folder = workspace() / "runs" / name
        if folder.exists():
            raise RecipeError(f"{folder} exists", fix=f"name it {free_name(folder).name}")
        if draft is not None and draft.folder.is_dir() and not draft.workers():
            folder.parent.mkdir(parents=True, exist_ok=True)
            draft.folder.rename(folder)
        return open_run(find_recipe(self.recipe), folder, self.overrides)


def _stem(source: str) -> str:
    return source.rpartition("/")[2] if is_hub(source) else Path(source).name.partition(".")[0]


def drop_drafts() -> None:
    """Delete runs that were looked at and not begun, unless a process is at work on one."""
    for path in (workspace() / DRAFTS).glob("*/recipe.yaml"):
        if not Run(path.parent, None).workers():  # type: ignore[arg-type]
            shutil.rmtree(path.parent, ignore_errors=True)


def keep_upload(name: str, content: bytes | memoryview) -> Path:
    """Write an uploaded file below `data/` of the workspace; a file that is there stays.

    Args:
        name: Its name, as the browser told it.
        content: Its bytes.

    Returns:
        The file, under another name if that one is taken by other content.

    Raises:
        DataError: The file is empty, or the folder cannot be written.
        HostError: The disk is full.
    """
    if not len(content):
        raise DataError(f"the file {name!r} is empty", fix="choose another one")
    plain, folder = _plain_name(name), workspace() / DATA
    path, number = folder / plain, 2
    try:
        folder.mkdir(exist_ok=True)
        while path.exists() and path.read_bytes() != content:
            stem, dot, ending = plain.partition(".")
            path, number = folder / f"{stem}-{number}{dot}{ending}", number + 1
        if not path.exists():
            _write(path, content)
    except OSError as error:
        if is_full(error, workspace()):
            raise disk_full(workspace(), len(content)) from error
        raise DataError(
            f"{path} cannot be written: {error.strerror}",
            fix=f"ls -ld {typed(folder)}   shows owner and permissions",
        ) from error
    return path


def _plain_name(name: str) -> str:
    """Return the last part of a path in letters that mean nothing elsewhere, at most 100 bytes."""
    plain = re.sub(r"[^\w .+-]", "-", Path(name.replace("\\", "/")).name).encode()
    return plain[-100:].decode(errors="ignore").lstrip(".") or "data.jsonl"


def _write(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def disk_line(recipe: Recipe, figures: RecipeFigures | None) -> tuple[str, bool]:
    """Return a sentence on the disk that a run needs, and whether there is enough.

    Args:
        recipe: The recipe.
        figures: Its figures, if it ships.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    size = figures.weights_bytes if figures else 0
    download = 0 if is_on_disk(recipe.model) else size
    checkpoints = 5 * size if recipe.method == "full" else 0
    needed = download + checkpoints + 2**30
    cache = Path(HF_HUB_CACHE)
    there = next(path for path in (cache, *cache.parents) if path.exists())
    left = min(free_bytes(there), free_bytes(workspace()))
    what = f"download {download / 1e9:.0f} GB, " if download else "nothing to download, "
    return f"{what}disk: {needed / GIB:.0f} GiB needed, {left / GIB:.0f} GiB free", left > needed
