"""Every recipe that ships loads, and says only what differs from the default."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY

from strixft.catalog.models import CONFIGS, MODELS
from strixft.formats.sources import find_sources
from strixft.recipe.load import flatten, load_recipe
from strixft.recipe.schema import explain
from strixft.support.errors import DataError

RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))
DEFAULTS = {key: default for key, default, _ in explain()}


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads(path: Path) -> None:
    load_recipe(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_data_that_ship_are_there(path: Path) -> None:
    recipe = load_recipe(path)
    assert Path(str(recipe.dataset.source)).is_file() or path.stem != "demo"
    assert set(flatten(yaml.safe_load(path.read_text()))) <= set(DEFAULTS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_without_data_says_how_to_give_them(path: Path) -> None:
    sources = load_recipe(path).dataset.sources()
    if path.stem == "demo":
        assert find_sources(sources)
        return
    with pytest.raises(DataError, match="the recipe comes without data") as caught:
        find_sources(sources)
    assert caught.value.fix.startswith("--set dataset.source=my-chats.jsonl ")


def test_the_demo_data_are_what_their_script_writes() -> None:
    folder = REPOSITORY / "recipes" / "data"
    written = subprocess.run(
        [sys.executable, folder / "make_home_lab.py"], capture_output=True, check=True
    )
    assert written.stdout == (folder / "home-lab.jsonl").read_bytes()


def test_each_config_has_its_source_and_hash_and_recipes_say_what_is_reconstructed() -> None:
    page = (CONFIGS / "README.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \| (.+?) \| `(\w{16})` \|$", page, re.MULTILINE)
    hashes = {
        one.name: hashlib.sha256(one.path.read_bytes()).hexdigest() for one in MODELS.values()
    }
    assert {name: start for name, _, _, start in rows} == {k: v[:16] for k, v in hashes.items()}
    told = {path.stem: "reconstructed" in path.read_text() for path in RECIPES}
    kinds = {name: kind for name, kind, _, _ in rows}
    pieced = {path.stem: kinds.get(load_recipe(path).model) == "reconstructed" for path in RECIPES}
    assert told == pieced
    assert len(RECIPES) >= 25
