"""Rows are found by name; a miss names the near hit."""

from dataclasses import dataclass

import pytest

from strixft.support.errors import RecipeError
from strixft.support.tables import Table, did_you_mean


@dataclass(frozen=True)
class Fruit:
    name: str


APPLE, PEAR = Fruit("apple"), Fruit("pear")
FRUITS = Table("fruit", PEAR, APPLE)


def test_a_row_is_found_by_its_name() -> None:
    assert FRUITS["apple"] is APPLE


def test_rows_keep_their_order() -> None:
    assert list(FRUITS) == ["pear", "apple"]


def test_a_table_knows_which_names_it_has() -> None:
    assert "apple" in FRUITS
    assert "plum" not in FRUITS


def test_a_miss_names_the_near_hit() -> None:
    with pytest.raises(RecipeError) as caught:
        FRUITS["aple"]
    assert caught.value.problem == "there is no fruit 'aple'"
    assert caught.value.fix == "did you mean 'apple'?"


def test_a_miss_far_from_every_row_lists_them_all() -> None:
    with pytest.raises(RecipeError) as caught:
        FRUITS["zzz"]
    assert caught.value.fix == "choose one of: pear, apple"


def test_two_rows_of_one_name_are_refused() -> None:
    with pytest.raises(AssertionError, match="two rows of fruit share a name"):
        Table("fruit", APPLE, Fruit("apple"))


def test_nothing_to_choose_from_is_said() -> None:
    assert did_you_mean("apple", []) == "there is nothing to choose from"
