"""Kinds of export and quantisations as data."""

import pytest

from strixft.catalog.exports import KINDS, QUANTISATIONS, with_needs
from strixft.support.errors import RecipeError


def test_a_kind_comes_after_what_it_needs() -> None:
    for kind in KINDS:
        order = with_needs((kind,))
        assert order[-1] == kind
        assert set(KINDS[kind].needs) < set(order)


def test_fewer_bits_may_differ_more() -> None:
    rows = sorted(QUANTISATIONS.values(), key=lambda row: -row.bits)
    assert [row.least_top1 for row in rows] == sorted((r.least_top1 for r in rows), reverse=True)


def test_an_unknown_kind_names_the_near_one() -> None:
    with pytest.raises(RecipeError, match="there is no export 'ggfu'") as caught:
        with_needs(("ggfu",))
    assert caught.value.fix == "did you mean 'gguf'?"
