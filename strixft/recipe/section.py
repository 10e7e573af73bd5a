"""The base of a recipe's sections, and checks of their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator

LARGEST = 2**31 - 1
"""Largest number that a recipe may hold."""


class Section(BaseModel):
    """A part of a recipe: unknown settings are refused, and numbers have bounds."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: object, info: ValidationInfo) -> object:
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind is not bool:  # to Python, true is the number 1
            raise ValueError("should not be true or false")
        return value

    @field_validator("*")
    @classmethod
    def _in_bounds(cls, value: object) -> object:
        if isinstance(value, int | float) and abs(value) > LARGEST:
            raise ValueError(f"should be {LARGEST} or less, it is {shown(value)}")
        if isinstance(value, str) and (not value.strip() or "\0" in value):
            raise ValueError(f"should be text, it is {shown(value)}")
        return value


def refuse(is_wrong: Callable[[Any], bool], problem: str) -> AfterValidator:
    """Refuse values with a problem, in which `{}` is the value."""

    def check(value: Any) -> Any:
        if is_wrong(value):
            raise ValueError(problem.format(value))
        return value

    return AfterValidator(check)


def at_least(least: int) -> AfterValidator:
    """Refuse numbers below a bound; words pass."""
    return refuse(
        lambda value: isinstance(value, int) and value < least,
        f"should be {least} or more, it is {{}}",
    )


def known(table: Mapping[str, Any]) -> AfterValidator:
    """Refuse names that a table does not have, and spell the others as it does."""
    return AfterValidator(lambda names: [table[name].name for name in names])


def shown(value: object) -> str:
    """Return a value in few words; a list or a section may be huge behind YAML's anchors."""
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, list):
        return "a list"
    text = repr(value)
    return "empty" if value is None else text if len(text) <= 60 else f"{text[:60]}…"
