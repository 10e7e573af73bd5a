"""`strixft.__all__` is what the package offers, and no name is also a module."""

import pkgutil
import subprocess
import sys

import strixft


def test_every_public_name_exists() -> None:
    assert strixft.__all__
    for name in strixft.__all__:
        assert getattr(strixft, name) is not None


def test_no_verb_shares_a_name_with_a_module() -> None:
    modules = {module.name for module in pkgutil.iter_modules(strixft.__path__)}
    assert not modules & set(strixft.__all__)


def test_data_are_prepared_without_the_modules_of_models() -> None:
    """They take seconds to import."""
    heavy = ("transformers.modeling_utils", "bitsandbytes", "peft", "torch._inductor.lowering")
    code = f"import sys, strixft.prepare.stage; print([n for n in {heavy} if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
