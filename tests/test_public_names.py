"""`strixft.__all__` is what the package offers, and no name is also a module."""

import pkgutil

import strixft


def test_every_public_name_exists() -> None:
    assert strixft.__all__
    for name in strixft.__all__:
        assert getattr(strixft, name) is not None


def test_no_verb_shares_a_name_with_a_module() -> None:
    modules = {module.name for module in pkgutil.iter_modules(strixft.__path__)}
    assert not modules & set(strixft.__all__)
