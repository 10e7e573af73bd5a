"""A recipe's model without its weights: where it comes from, its configuration and tokenizer.

Nothing here loads the modules of a model: preparing data needs none of them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from strixft.catalog.models import MODELS
from strixft.model.config import first_lines, read_config
from strixft.model.files import EMBEDDED, embedded_folder
from strixft.recipe.schema import Recipe
from strixft.support.errors import HostError, RecipeError
from strixft.support.tables import did_you_mean


def model_source(name: str) -> str:
    """Return what transformers should load for a recipe's `model`: a folder or a hub id.

    Raises:
        RecipeError: An embedded model has another name.
        HostError: The package with the embedded model is missing.
    """
    if name.startswith("embedded:"):
        if name not in EMBEDDED:
            raise RecipeError(
                f"there is no embedded model {name!r}", fix=f"model: {next(iter(EMBEDDED))}"
            )
        return str(embedded_folder(name))
    path = os.path.expanduser(name)
    if not os.path.isdir(path):
        return name
    _refuse_adapter(Path(path))
    return path


def _refuse_adapter(folder: Path) -> None:
    """Refuse a folder that holds an adapter: transformers would load its base, and both."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    raise RecipeError(
        f"model: {folder} holds an adapter for {base or 'a model that it does not name'}",
        fix=f"model: {base or 'its base'}, or a merged model: strixft export … --to merged"
        f"   (a whole model beside it is read once {file.name} is gone)",
    )


HUB_ANSWERS_S = 10.0
"""Longest wait for the hub's first answer."""


@contextlib.contextmanager
def model_errors_explained(name: str) -> Iterator[None]:
    """Turn the errors of loading a model into a `RecipeError` that says what to change."""
    try:
        yield
    except RecipeError:
        raise
    except (OSError, ValueError, KeyError) as error:
        path = Path(os.path.expanduser(name))
        if path.is_absolute() and not path.is_dir():
            beside = [file.parent.name for file in sorted(path.parent.glob("*/config.json"))]
            near = did_you_mean(path.name, beside) if beside else "a folder that holds config.json"
            problem = f"model: {path} is not a folder"
            fix = f"{near}   (relative to the recipe's file, or with --set to the current folder)"
        elif "trust_remote_code" in str(error):
            problem = f"model {name!r} runs Python code of its own when it is loaded"
            fix = "read its *.py files; then, if you trust them: trust_remote_code: true"
        elif "gguf" in name.lower():
            problem = f"model {name!r} cannot be loaded: a model in GGUF is run, not trained"
            fix = "model: the version of it with 16-bit weights in *.safetensors"
        else:
            problem = f"model {name!r} cannot be loaded: {first_lines(error)}"
            fix = (
                "model: a folder with config.json, a hub id (is the network there? is it gated:"
                " hf auth login), or embedded:smollm2-135m"
            )
        raise RecipeError(problem, fix=fix) from error


def load_config(recipe: Recipe) -> Any:
    """Return the model's checked configuration; the shipped one until the model is downloaded.

    Raises:
        RecipeError: The model does not exist, its configuration is damaged, or it needs code of its
            own.
    """
    from huggingface_hub import try_to_load_from_cache

    name = recipe.model
    with model_errors_explained(name):
        is_here = name not in MODELS or Path(name).is_dir()
        if is_here or isinstance(try_to_load_from_cache(name, "config.json"), str):
            source = model_source(name)
        else:
            source = str(MODELS[name].path)
        return read_config(
            source, offline=recipe.offline, trust_remote_code=recipe.trust_remote_code
        )


def _require_hub(name: str) -> None:
    """Require the hub where a model is not on this machine: its library tries for minutes.

    Raises:
        HostError: It cannot be reached.
    """
    import httpx
    from huggingface_hub import constants, try_to_load_from_cache

    known = try_to_load_from_cache(name, "tokenizer_config.json")
    if isinstance(known, str) or constants.HF_HUB_OFFLINE:
        return
    try:
        httpx.head(constants.ENDPOINT, timeout=HUB_ANSWERS_S)
    except httpx.HTTPError as error:
        raise HostError(
            f"{name} is not on this machine, and {constants.ENDPOINT} cannot be reached:"
            f" {first_lines(error)}",
            fix="connect this machine to the network; or model: a folder that holds it",
        ) from error


def load_tokenizer(recipe: Recipe) -> Any:
    """Load the model's tokenizer.

    Raises:
        RecipeError: The model does not exist.
    """
    from transformers import AutoTokenizer

    with model_errors_explained(recipe.model):
        source = model_source(recipe.model)
        if not recipe.offline and not os.path.isdir(source):
            _require_hub(recipe.model)
        try:
            return AutoTokenizer.from_pretrained(
                source,
                local_files_only=recipe.offline,
                trust_remote_code=recipe.trust_remote_code,
            )
        except Exception as error:  # whatever the classes of configuration and tokenizer raise
            load_config(recipe)  # names the faults of config.json
            on_the_hub = not os.path.isdir(source) and isinstance(error, OSError)
            if on_the_hub or "trust_remote_code" in str(error):
                raise
            raise RecipeError(
                f"the tokenizer of {recipe.model} cannot be loaded: {first_lines(error)}",
                fix="a tokenizer lies beside config.json, as tokenizer.json or the files that its"
                f" class reads: hf download ORG/NAME --include '*token*' --local-dir {source}",
            ) from error
