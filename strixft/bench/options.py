"""Options of the command line from a bench's function: its parameters, its docstring's words."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from strixft.support.errors import RecipeError
from strixft.support.tables import did_you_mean

COUNTED = ("repeat", "updates")
"""Numbers that 0 is too small for; of the others it means: as the bench chooses."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a bench."""

    name: str
    kind: type
    default: Any
    help: str


def _helps(documented: Any) -> dict[str, str]:
    """What the section `Args` of a docstring says of each name."""
    text = inspect.getdoc(documented) or ""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    found = (
        re.findall(r"^    (\w+): ((?:.+\n?)(?:     .+\n?)*)", section[1], re.M) if section else []
    )
    return {name: " ".join(says.split()) for name, says in found}


def _group(hint: Any) -> type | None:
    """The dataclass behind a parameter such as `subject: Subject | None`."""
    kinds = [kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)]
    return kinds[0] if kinds and isinstance(kinds[0], type) else None


def _of_group(group: type) -> list[Setting]:
    hints, helps = get_type_hints(group), _helps(group)
    return [
        Setting(f.name, hints[f.name], None if f.default is MISSING else f.default, helps[f.name])
        for f in fields(group)
    ]


def settings_of(function: Callable[..., Any]) -> list[Setting]:
    """Every setting of a bench; those of a dataclass stand among the others."""
    hints, helps, found = get_type_hints(function), _helps(function), list[Setting]()
    for name, parameter in inspect.signature(function).parameters.items():
        group = _group(hints[name])
        if group is None:
            found.append(Setting(name, hints[name], parameter.default, helps[name]))
        else:
            found += _of_group(group)
    return found


def _check(given: Mapping[str, Any], known: set[str]) -> None:
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if name not in known:
            raise RecipeError(f"this bench has no setting {name!r}", fix=did_you_mean(name, known))
        least = 1 if name in COUNTED else 0
        if isinstance(value, int | float) and not value >= least:
            raise RecipeError(
                f"{option} {value} is too small", fix=f"{option} with {least} or more"
            )


def bind(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a bench from flat settings.

    Raises:
        RecipeError: It has no such setting, or a number is too small.
    """
    _check(given, {setting.name for setting in settings_of(function)})
    hints, arguments = get_type_hints(function), dict[str, Any]()
    for name in inspect.signature(function).parameters:
        group = _group(hints[name])
        if group is None:
            arguments |= {name: given[name]} if name in given else {}
        else:
            inside = {field.name for field in fields(group)}
            arguments[name] = group(**{key: value for key, value in given.items() if key in inside})
    return arguments
