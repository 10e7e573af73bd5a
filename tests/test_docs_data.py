"""The page on data names every format, setting and problem that there is."""

import re

from conftest import REPOSITORY

from strixft.formats.known_formats import FORMATS
from strixft.formats.sources import FILE_KINDS
from strixft.recipe.schema import Dataset

PAGE = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")


def test_every_format_and_ending_is_explained() -> None:
    for name in (*FORMATS, *FILE_KINDS):
        assert f"`{name}`" in PAGE


def test_every_setting_is_explained() -> None:
    for name in Dataset.model_fields:
        assert re.search(rf"\b{name}\b", PAGE), name


def test_every_kind_of_problem_is_explained() -> None:
    kinds = set()
    folders = [REPOSITORY / "strixft" / name for name in ("data", "formats", "prepare")]
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        kinds |= set(re.findall(r'RowFault\(\s*"(\w+)"', text))
        kinds |= set(re.findall(r'self\._note\(\s*row, "(\w+)"', text))
        kinds |= set(re.findall(r'yield "(\w+)", ', text))
        kinds |= set(re.findall(r'\bnote\("(\w+)", ', text))
        kinds |= set(re.findall(r'_note\(\w+, \[\("(\w+)", ', text))
    assert len(kinds) > 25
    for kind in kinds | {"leak", "duplicate", "near_duplicate", "secret", "email", "phone", "cut"}:
        assert f"`{kind}`" in PAGE, kind
