"""Variables that must precede torch are set by `import strixft`, and never overrule the user."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import WriteRecipe
from test_cli import Type
from test_cli import enter as enter

from strixft.guard.host import find_host
from strixft.prepare.stage import prepare_recipe
from strixft.run.folder import Run
from strixft.support import environment
from strixft.support.environment import BEFORE_TORCH, OVERRIDE, prepare, seen_by_torch
from strixft.support.errors import HostError

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
    monkeypatch.setattr(environment, "_too_late", [])
    monkeypatch.setitem(sys.modules, "torch", sys)
    assert prepare() == [NAME]
    assert seen_by_torch() == {NAME: None}


def test_a_result_has_the_variables_as_torch_saw_them(tiny_run: Run) -> None:
    assert prepare_recipe(tiny_run).host["environment"] == {NAME: os.environ[NAME]}


@pytest.fixture
def rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch as a build for ROCm that has a GPU."""
    monkeypatch.setattr(torch.version, "hip", "7.13.0")
    monkeypatch.setenv("STRIXFT_DEVICE", "cuda")


@pytest.mark.usefixtures("rocm")
def test_a_gpu_that_pretends_to_be_another_is_refused(
    monkeypatch: pytest.MonkeyPatch, enter: Type, write_recipe: WriteRecipe
) -> None:
    monkeypatch.setenv(OVERRIDE, "11.0.0")
    with pytest.raises(HostError) as caught:
        find_host("auto")
    assert caught.value.problem == (
        "HSA_OVERRIDE_GFX_VERSION=11.0.0 is set, and it claims to be another GPU: 11.0.0 ends in"
        " a memory access fault, and every value keeps gfx1151's own kernels away"
    )
    assert caught.value.fix.startswith("unset HSA_OVERRIDE_GFX_VERSION   here and where it is set:")
    assert caught.value.fix.endswith("then start Python again")
    assert find_host("cpu").device == "cpu"
    assert find_host("strix-halo-128").architecture == "gfx1151"
    result = enter("plan", str(write_recipe()))
    assert result.code == 1
    assert "HSA_OVERRIDE_GFX_VERSION=11.0.0 is set" in result.err


def test_without_rocm_the_override_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE, "11.0.0")
    assert find_host("auto").here
