"""Check before training that the result can be exported as the recipe asks."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from strixft.catalog.exports import with_needs
from strixft.catalog.methods import METHODS
from strixft.model.files import model_folder, refuse_pickles
from strixft.model.mergeable import base_entries, check_merge
from strixft.model.source import model_source
from strixft.recipe.schema import Recipe
from strixft.servers import gguf
from strixft.servers.llama_cpp import require_runtime
from strixft.support.errors import RecipeError, StageError

SERVED = frozenset(("gguf", "gguf-lora"))
"""Kinds that are started with llama.cpp and compared with the trained model."""


def require_kinds(
    recipe: Recipe, kinds: Collection[str], quantisations: Sequence[str] = ()
) -> None:
    """Refuse exports that the method cannot have, or that need a program which is not there.

    Args:
        recipe: What is trained.
        kinds: Kinds of export.
        quantisations: Storage of GGUF files; by default the recipe's.

    Raises:
        HostError: A program is missing.
        StageError: The method has no such export.
    """
    if "gguf-lora" in kinds and METHODS[recipe.method].adapter != "lora":
        raise StageError(f"method {recipe.method} has no plain LoRA adapter", fix="--to gguf")
    if "gguf-lora" in kinds and recipe.lora.modules_to_save:
        names = ", ".join(recipe.lora.modules_to_save)
        raise StageError(f"a GGUF adapter cannot hold {names}, trained whole", fix="--to gguf")
    gguf.require_tools(kinds, quantisations or recipe.export.gguf)
    if SERVED.intersection(kinds):
        require_runtime()


def _merge_warnings(recipe: Recipe) -> list[str]:
    """Return reasons why what is trained cannot be merged, or why that is not known."""
    refuse_pickles(model_source(recipe.model))
    entries = base_entries(recipe)
    if entries is None:
        why = "the files of the base are not on this machine: whether it can be merged is not known"
        return [f"{why} (hf download {recipe.model})"]
    try:
        check_merge(recipe, entries)
    except StageError as error:
        told = f"what is trained could not be merged into {recipe.model}: {error.problem}"
        if "merged" in with_needs(tuple(recipe.export.to)):
            raise RecipeError(told, fix=error.fix) from error
        return [told]
    return []


def require_exportable(recipe: Recipe) -> list[str]:
    """Check before training that its result can be exported: the merge and the converter run dry.

    Returns:
        What cannot be exported, in sentences, where the recipe does not ask for it.

    Raises:
        HostError: The recipe asks for an export that needs a program which is not there.
        RecipeError: It asks for one that the model or the method cannot have.
    """
    kinds = with_needs(tuple(recipe.export.to))
    warnings = _merge_warnings(recipe)
    require_kinds(recipe, kinds)
    folder = model_folder(model_source(recipe.model))
    if folder is not None and SERVED.intersection(kinds):
        try:
            gguf.check_convertible(folder)
        except StageError as error:
            raise RecipeError(
                f"{recipe.model}: {error.problem}",
                fix=f"--set 'export.to=[merged]'; or {gguf.NEWER_CONVERTER}",
                settings={"export.to": ["merged"]},
            ) from error
    return warnings
