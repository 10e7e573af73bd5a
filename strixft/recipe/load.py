"""The recipe: what one run does, as a YAML file checked before anything else happens.

Unknown keys are refused, all faults are reported together, and every setting has one docstring,
from which `strixft recipe --explain` and `--schema` are made.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import (
    ValidationError,
)

from strixft.formats import sources
from strixft.recipe.find import find_recipe
from strixft.recipe.schema import Evaluate, Recipe, Source, as_section, explain, shown
from strixft.support.errors import FIX, RecipeError
from strixft.support.tables import did_you_mean

NEAR = 0.8
"""How alike two names of settings are that are taken for one, 0 to 1."""

SHOWN_FAULTS = 20


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML whose keys are text and stand once; a date is text."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        problem = None
        if key.tag != yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG:
            problem = "a key should be text; a number, a list or a merge (<<) is none"
        elif key.value in seen:
            problem = f"the key {key.value!r} stands twice"
        if problem:
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)

_StrictLoader.yaml_implicit_resolvers = {
    first: [row for row in rows if row[0] != "tag:yaml.org,2002:timestamp"]
    for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse_yaml(text: str, *, name: str, fix: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = ", ".join(text for text in (error.context, error.problem) if text)
        raise RecipeError(f"{name}{where}: {problem}", fix=fix) from error
    except RecursionError as error:
        raise RecipeError(f"{name} is nested too deeply", fix=fix) from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{name} is not YAML: {error}", fix=fix) from error


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a recipe file as they stand there.

    Raises:
        RecipeError: The file cannot be read, is not YAML, or holds no settings.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8 text (byte {error.start})", fix=f"save {path} as UTF-8"
        ) from error
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read: {error.strerror}", fix=f"ls -l {path}   shows whose it is"
        ) from error
    data = _parse_yaml(text, name=str(path), fix=f"correct {path}")
    if not isinstance(data, dict):
        raise RecipeError(f"{path} holds no settings", fix="strixft recipe demo   shows one")
    return data


def parse_override(text: str) -> tuple[str, Any]:
    """`train.learning_rate=2e-4` as key and value.

    >>> parse_override("train.epochs=3")
    ('train.epochs', 3)
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            f"--set {shown(text)} has no key or no '='", fix="--set train.learning_rate=2e-4"
        )
    name = f"--set {shown(text)}"
    return key.strip(), _parse_yaml(value, name=name, fix="put the value in quotes")


def parse_overrides(overrides: object) -> dict[str, Any]:
    """Overrides of a notebook: a mapping of dotted keys, or its JSON text (papermill's `-p`).

    Raises:
        RecipeError: They are neither.
    """
    fix = """-p overrides '{"train.learning_rate": 2e-4}'"""
    if isinstance(overrides, str):
        try:
            overrides = json.loads(overrides.strip() or "{}")
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"overrides are not JSON: {error}", fix=fix) from error
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise RecipeError(
            f"overrides should be a mapping of dotted keys, they are {shown(overrides)}", fix=fix
        )
    return dict(overrides)


def _override(data: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(data)
    for dotted, value in overrides.items():
        *sections, last = str(dotted).split(".")
        if not all((*sections, last)):
            raise RecipeError(
                f"{dotted!r} is not a dotted key", fix="--set train.learning_rate=2e-4"
            )
        place: Any = result
        for section in sections:
            if place.get(section) is None:  # `judge: null` is a section that is not there yet
                place[section] = {}
            place = place[section]
            if not isinstance(place, dict):
                raise RecipeError(
                    f"{dotted}: {section!r} is not a section", fix="strixft recipe --explain"
                )
        both = isinstance(value, Mapping) and isinstance(place.get(last), Mapping)
        place[last] = {**place[last], **value} if both else value
    return result


WANTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a section",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "more than {gt:.12g}",
    "greater_than_equal": "{ge:.12g} or more",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "less than {lt:.12g}",
    "less_than_equal": "{le:.12g} or less",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_type": "a section",
    "string_type": "text",
}
"""pydantic's name of a fault → what would be right."""


def _section(section: Any, key: str | int) -> Any:
    """The section behind a key of a section; None where there is a plain setting or nothing."""
    field = section.model_fields.get(key) if section else None
    return as_section(field.annotation) if field else None


def _items(section: Any, key: str | int) -> Any:
    """The section of which a key of a section holds a list; None where it holds none."""
    field = section.model_fields.get(key) if section else None
    lists = [kind for kind in get_args(field.annotation) if get_args(kind)] if field else []
    return next((found for kind in lists if (found := as_section(get_args(kind)[0]))), None)


def _walk(location: Sequence[str | int]) -> tuple[list[str], Any]:
    """Keys and indices on the way to a setting, and the section that the last is looked up in.

    The branch of a union, which pydantic adds, is no part of the way.
    """
    inner: Any = Recipe
    section = items = None
    parts = []
    for part in location:
        if inner or isinstance(part, int):
            parts.append(str(part))
        section, items = inner, _items(inner, part) or items
        inner = items if isinstance(part, int) else _section(section, part)
    return parts, section


def _place(location: Sequence[str | int]) -> str:
    """Dotted key, and the index of a list."""
    return ".".join(_walk(location)[0])


def _near_setting(location: Sequence[str | int]) -> str:
    word, (_, section) = location[-1], _walk(location)
    elsewhere = [key for key, *_ in explain() if key.endswith(f".{word}")]
    if elsewhere and not get_close_matches(str(word), section.model_fields, cutoff=NEAR):
        return f"did you mean {elsewhere[0]!r}?"
    return did_you_mean(str(word), section.model_fields)


def _fault(place: str, errors: Sequence[Mapping[str, Any]]) -> str:
    """One fault as text; a union has one error for each of its branches."""
    first = errors[0]
    if first["type"] == "extra_forbidden":
        return f"{place}: there is no such setting; {_near_setting(first['loc'])}"
    if first["type"] == "missing":
        return f"{place}: is missing"
    if first["type"] not in WANTED:
        text = first["msg"].removeprefix("Value error, ").replace(FIX, "; ")
        return f"{place}: {text}"
    wanted = [WANTED[row["type"]].format_map(row.get("ctx", {})) for row in errors]
    return f"{place}: should be {' or '.join(wanted)}, it is {shown(first['input'])}"


def _faults(error: ValidationError) -> list[str]:
    by_place: dict[str, list[Mapping[str, Any]]] = {}
    for row in error.errors(include_url=False):
        by_place.setdefault(_place(row["loc"]), []).append(row)
    # a list's item says more than the list
    outer = {place[:end] for place in by_place for end, sign in enumerate(place) if sign == "."}
    return [_fault(place, rows) for place, rows in by_place.items() if place not in outer]


def check_recipe(data: Mapping[str, Any], *, name: str) -> Recipe:
    """A recipe from plain data.

    Args:
        data: The settings.
        name: What to call it in errors, usually the file.

    Raises:
        RecipeError: With every fault found.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        faults = _faults(error)
        listed = "".join(f"\n  {fault}" for fault in faults[:SHOWN_FAULTS])
        more = len(faults) - SHOWN_FAULTS
        rest = f"\n  … and {more} more" if more > 0 else ""
        noun = "fault" if len(faults) == 1 else "faults"
        raise RecipeError(
            f"{name} has {len(faults)} {noun}:{listed}{rest}",
            fix="strixft recipe --explain   shows every setting",
        ) from None


def _located(source: str | list[Source], folder: Path) -> str | list[Source]:
    """Sources as absolute paths or ids of the hub."""
    if isinstance(source, str):
        return sources.resolve(source, folder)
    return [
        one.model_copy(update={"source": sources.resolve(one.source, folder)}) for one in source
    ]


def _model(name: str, folder: Path) -> str:
    """A model's folder as an absolute path: beside the recipe, or where the command is typed.

    What can only be a path starts at the recipe, there or not; other names may be the hub's.
    """
    places = [place / os.path.expanduser(name) for place in (folder, Path.cwd())]
    found = [place for place in places if os.path.isdir(place)]
    if not found and name.startswith(("./", "../", "~")):
        found = places
    return os.path.realpath(found[0]) if found else name


def _prompts(prompts: list[str] | str, folder: Path) -> list[str]:
    """Prompts as a list: a file's lines become part of the recipe."""
    if not isinstance(prompts, str):
        return prompts
    path = folder / Path(prompts).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"evaluate.prompts: {path} cannot be read: {getattr(error, 'strerror', error)}",
            fix="evaluate.prompts: a text file with one prompt a line, or a list of prompts",
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _evaluation(asked: Evaluate, folder: Path) -> Evaluate:
    """The section with its files found.

    Raises:
        RecipeError: One is not there.
    """
    tasks = asked.task_folder
    if tasks is not None:
        tasks = str((folder / Path(tasks).expanduser()).resolve())
        if not os.path.isdir(tasks):
            raise RecipeError(
                f"evaluate.task_folder: {tasks} is no folder",
                fix="evaluate.task_folder: a folder that holds YAML files of lm-eval",
            )
    return asked.model_copy(
        update={"prompts": _prompts(asked.prompts, folder), "task_folder": tasks}
    )


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe file, checked, with overrides put in and its data file found.

    Args:
        name_or_path: `demo`, `recipes/demo.yaml` or any path.
        overrides: Values by dotted key, such as `{"train.learning_rate": 2e-4}`.

    Raises:
        RecipeError: No such file, not YAML, or settings that do not describe a run.
    """
    path = find_recipe(name_or_path)
    recipe = check_recipe(_override(read_settings(path), overrides or {}), name=str(path))
    source = _located(recipe.dataset.source, path.parent)
    here = Path.cwd() if "model" in (overrides or {}) else path.parent
    return recipe.model_copy(
        update={
            "model": _model(recipe.model, here),
            "dataset": recipe.dataset.model_copy(update={"source": source}),
            "evaluate": _evaluation(recipe.evaluate, path.parent),
        }
    )


def dump_recipe(recipe: Recipe) -> str:
    """The complete recipe as YAML."""
    text: str = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
    return text


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        dotted = f"{prefix}{key}"
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{dotted}.") if nested else {dotted: value}
    return flat
