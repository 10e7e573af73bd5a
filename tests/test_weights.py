"""A base model is known by its files, and none of them runs code."""

from __future__ import annotations

import os
import pickle
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WriteRecipe
from safetensors.torch import load_file

from strixft.model import files
from strixft.model.files import fingerprint_base, model_folder, refuse_pickles
from strixft.model.load import load_base
from strixft.model.source import load_config
from strixft.recipe.load import load_recipe
from strixft.support.errors import RecipeError


def test_every_file_that_is_read_is_in_the_fingerprint(tiny_model: Path) -> None:
    found = fingerprint_base(str(tiny_model))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found)
    assert found == fingerprint_base(str(tiny_model))


def test_a_model_that_is_not_here_has_no_files() -> None:
    assert fingerprint_base("nobody/nothing") == {}
    assert model_folder("not a name: at all") is None


def test_a_large_file_is_known_by_its_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(files, "SAMPLE_BYTES", 100)
    path = tmp_path / "model.safetensors"
    data = bytearray(random.Random(0).randbytes(200_000))
    path.write_bytes(data)
    before = fingerprint_base(str(tmp_path))
    for at in range(0, len(data), 500):  # as training does, it changes all over
        data[at] ^= 1
    path.write_bytes(data)
    assert fingerprint_base(str(tmp_path)) != before


class Runs:
    """What a pickle can hide."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_weights_that_are_a_pickle_are_never_read(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(RecipeError, match=r"pytorch_model\.bin is a pickle, which can run code"):
        refuse_pickles(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_recipe_on_a_pickle_is_refused(tmp_path: Path, write_recipe: WriteRecipe) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    recipe = load_recipe(write_recipe(model=str(tmp_path)))
    with pytest.raises(RecipeError, match="only safetensors are loaded"):
        load_base(recipe, "cpu", torch.float32)


def test_the_fix_for_a_pickle_works_and_runs_nothing(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(3.0)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(RecipeError) as caught:
        refuse_pickles(str(tmp_path))
    command = shlex.split(caught.value.fix.partition("or: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert load_file(tmp_path / "model.safetensors")["w"].tolist() == [0, 1, 2]
    refuse_pickles(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
    assert subprocess.run([sys.executable, *command[1:]], capture_output=True).returncode
    assert not Path("ran").exists()


def test_a_model_with_code_of_its_own_needs_a_line_in_the_recipe(
    tmp_path: Path, write_recipe: WriteRecipe
) -> None:
    folder = tmp_path / "own-code"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}'
    )
    (folder / "configuration_mine.py").write_text(
        "from pathlib import Path\n"
        "from transformers import PretrainedConfig\n"
        "Path('ran').touch()\n"
        "class Mine(PretrainedConfig):\n    model_type = 'mine'\n"
    )
    recipe = load_recipe(write_recipe(model=str(folder)))
    with pytest.raises(RecipeError, match="runs Python code of its own") as caught:
        load_config(recipe)
    assert caught.value.fix.endswith("trust_remote_code: true")
    assert not Path("ran").exists()
    trusted = recipe.model_copy(update={"trust_remote_code": True})
    assert load_config(trusted).model_type == "mine"
    assert Path("ran").exists()
