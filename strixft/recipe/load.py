"""Read a recipe: the YAML file that describes one run, checked before anything else happens.

Unknown keys are refused, and all faults are reported together.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from strixft.formats import sources
from strixft.recipe.find import find_recipe, workspace
from strixft.recipe.schema import Recipe, Source, as_section, explain
from strixft.recipe.section import shown
from strixft.support.errors import RecipeError, StrixftError
from strixft.support.tables import did_you_mean
from strixft.support.text import typed

NEAR = 0.8
"""Least similarity of two names of settings to be taken for one, 0 to 1."""

SHOWN_FAULTS = 20


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML whose keys are text and appear once; a date is text."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        problem = None
        if key.tag != yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG:
            problem = "a key should be text, not a number, a list or a merge (<<)"
        elif key.value in seen:
            problem = f"the key {key.value!r} appears twice"
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
    """Return the settings of a recipe file, unchecked.

    Raises:
        RecipeError: The file cannot be read, is not YAML, or has no settings.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8 text (byte {error.start})", fix=f"save {path} as UTF-8"
        ) from error
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read: {error.strerror}", fix=f"ls -l {path}   shows its owner"
        ) from error
    data = _parse_yaml(text, name=str(path), fix=f"correct {path}")
    if not isinstance(data, dict):
        raise RecipeError(f"{path} has no settings", fix="strixft recipe demo   shows a recipe")
    return data


def parse_override(text: str) -> tuple[str, Any]:
    """Split `train.learning_rate=2e-4` into key and value.

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


def typed_override(key: str, value: Any) -> str:
    """Return an override as it is typed, without JSON's quotes where plain text means the same.

    >>> typed_override("notify", ["desktop"]), typed_override("train.epochs", 2)
    ("--set 'notify=[desktop]'", '--set train.epochs=2')
    """
    text = json.dumps(value, ensure_ascii=False)
    plain = text.replace('"', "")
    same = "\\" not in text and _means(f"{key}={plain}", value)
    return f"--set {typed(f'{key}={plain if same else text}')}"


def _means(text: str, value: Any) -> bool:
    with contextlib.suppress(RecipeError):
        return bool(parse_override(text)[1] == value)
    return False


def parse_overrides(overrides: object) -> dict[str, Any]:
    """Return the overrides of a notebook: a mapping of dotted keys, or its JSON text.

    papermill's `-p` passes text.

    Raises:
        RecipeError: The overrides are neither.
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
            if place.get(section) is None:  # `judge: null` is a section to be created
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
"""pydantic's name of a fault → the correct value."""


def _walk(location: Sequence[str | int]) -> tuple[list[str], Any]:
    """Return the keys and indices that lead to a setting, and the section that holds it.

    pydantic adds branches of unions to a location; they are left out.
    """
    inner: Any = Recipe
    section = items = None
    parts = []
    for part in location:
        if inner or isinstance(part, int):
            parts.append(str(part))
        section, field = inner, inner.model_fields.get(part) if inner else None
        if field:
            lists = [get_args(kind)[0] for kind in get_args(field.annotation) if get_args(kind)]
            items = next(filter(None, map(as_section, lists)), items)
        inner = items if isinstance(part, int) else as_section(field.annotation) if field else None
    return parts, section


def _near_setting(location: Sequence[str | int]) -> str:
    word, (_, section) = location[-1], _walk(location)
    elsewhere = [key for key, *_ in explain() if key.endswith(f".{word}")]
    if elsewhere and not get_close_matches(str(word), section.model_fields, cutoff=NEAR):
        return f"did you mean {elsewhere[0]!r}?"
    return did_you_mean(str(word), section.model_fields)


def _fault(place: str, errors: Sequence[Mapping[str, Any]]) -> str:
    """Return one fault as text; a union has one error for each of its branches."""
    first = errors[0]
    if first["type"] == "extra_forbidden":
        return f"{place}: there is no such setting; {_near_setting(first['loc'])}"
    if first["type"] == "missing":
        return f"{place}: is missing"
    if first["type"] == "value_error":  # one of ours
        error = first["ctx"]["error"]
        own = isinstance(error, StrixftError)
        return f"{place}: {f'{error.problem}; {error.fix}' if own else error}"
    if first["type"] not in WANTED:
        return f"{place}: {first['msg']}"
    wanted = [WANTED[row["type"]].format_map(row.get("ctx", {})) for row in errors]
    return f"{place}: should be {' or '.join(wanted)}, it is {shown(first['input'])}"


def _faults(error: ValidationError) -> list[str]:
    by_place: dict[str, list[Mapping[str, Any]]] = {}
    for row in error.errors(include_url=False):
        by_place.setdefault(".".join(_walk(row["loc"])[0]), []).append(row)
    outer = {place[:end] for place in by_place for end, sign in enumerate(place) if sign == "."}
    # the fault of a list's item says more than that of the list
    return [_fault(place, rows) for place, rows in by_place.items() if place not in outer]


def check_recipe(data: Mapping[str, Any], *, name: str) -> Recipe:
    """Build a recipe from plain data.

    Args:
        data: The settings.
        name: Its name in errors, usually the file.

    Raises:
        RecipeError: With all faults.
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


def _model(name: str, folder: Path) -> str:
    """Return a model's folder as an absolute path: beside the recipe, or in the current folder.

    A name that can only be a path is relative to the recipe even if nothing is there; other names
    may be the hub's.
    """
    places = [place / os.path.expanduser(name) for place in (folder, Path.cwd())]
    found = [place for place in places if os.path.isdir(place)]
    if not found and name.startswith(("./", "../", "~")):
        found = places
    return os.path.realpath(found[0]) if found else name


def _prompts(prompts: list[str] | str, folder: Path) -> list[str]:
    """Return prompts as a list: a file's lines become part of the recipe."""
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


def _task_folder(name: str | None, folder: Path) -> str | None:
    if name is None:
        return None
    found = (folder / Path(name).expanduser()).resolve()
    if not os.path.isdir(found):
        raise RecipeError(
            f"evaluate.task_folder: {found} is not a folder",
            fix="evaluate.task_folder: a folder that holds YAML files of lm-eval",
        )
    return str(found)


def _run_folder(name: str | None, folder: Path) -> str | None:
    """Return the folder of a run by its path, beside the recipe or here, or by its name."""
    if name is None:
        return None
    given = Path(os.path.expanduser(name))
    for place in (folder, Path.cwd(), workspace(), workspace() / "runs"):
        if os.path.isfile(place / given / "recipe.yaml"):
            return os.path.realpath(place / given)
    raise RecipeError(f"init_from: there is no run {name!r}", fix="strixft runs   lists the runs")


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe file, apply overrides, and resolve the paths in it.

    Args:
        name_or_path: `demo`, `recipes/demo.yaml` or any path.
        overrides: Values by dotted key, such as `{"train.learning_rate": 2e-4}`.

    Raises:
        RecipeError: The file does not exist or is not YAML, or its settings do not describe a run.
    """
    path = find_recipe(name_or_path)
    recipe = check_recipe(_override(read_settings(path), overrides or {}), name=str(path))
    folder, dataset, evaluate = path.parent, recipe.dataset, recipe.evaluate
    is_typed = bool({"dataset", "dataset.source"} & set(overrides or {}))
    data_folder = Path.cwd() if is_typed else folder
    source: str | list[Source]
    if isinstance(dataset.source, str):
        source = sources.resolve(dataset.source, data_folder)
    else:
        source = [
            one.model_copy(update={"source": sources.resolve(one.source, data_folder)})
            for one in dataset.source
        ]
    files = {
        "prompts": _prompts(evaluate.prompts, folder),
        "task_folder": _task_folder(evaluate.task_folder, folder),
    }
    return recipe.model_copy(
        update={
            "model": _model(recipe.model, Path.cwd() if "model" in (overrides or {}) else folder),
            "dataset": dataset.model_copy(update={"source": source}),
            "evaluate": evaluate.model_copy(update=files),
            "init_from": _run_folder(recipe.init_from, folder),
        }
    )


def dump_recipe(recipe: Recipe) -> str:
    """Return the complete recipe as YAML."""
    text: str = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
    return text


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        dotted = f"{prefix}{key}"
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{dotted}.") if nested else {dotted: value}
    return flat
