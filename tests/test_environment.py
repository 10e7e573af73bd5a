"""Variables that must precede torch are set by `import strixft`, and never overrule the user."""

import os
import subprocess
import sys

import pytest

from strixft.environment import BEFORE_TORCH, prepare

NAME = "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"


def seen_after_import(**environment: str) -> str:
    code = f"import strixft, os; print(os.environ[{NAME!r}], strixft._set_too_late)"
    keep = {key: value for key, value in os.environ.items() if key not in BEFORE_TORCH}
    found = subprocess.run(
        [sys.executable, "-c", code], env=keep | environment, capture_output=True, check=True
    )
    return found.stdout.decode().strip()


def test_what_is_missing_is_set() -> None:
    assert seen_after_import() == "1 []"


def test_what_the_user_set_stays() -> None:
    assert seen_after_import(**{NAME: "0"}) == "0 []"


def test_too_late_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NAME)
    monkeypatch.setitem(sys.modules, "torch", sys)
    assert prepare() == [NAME]
