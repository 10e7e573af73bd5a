"""The guide: every figure has a mark, versions are those installed, links lead somewhere."""

from __future__ import annotations

import re
import runpy

import pytest
from conftest import REPOSITORY

from strixft.doctor.checks import CHECKS
from strixft.doctor.devices import BOARDS
from strixft.doctor.packages import ROCM_INDEX, ROCM_TORCH
from strixft.doctor.system import BAD_FIRMWARE
from strixft.plan.result import plan_figures
from strixft.recipe.load import load_recipe

DOCS = REPOSITORY / "docs"
GUIDE = (DOCS / "strix-halo.md").read_text()
NPU = (DOCS / "npu.md").read_text()
MARK = re.compile(r"\[[MVCDT]\]")


def _tables(text: str) -> list[list[str]]:
    """Rows of each table, without its head."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [block.strip().splitlines()[2:] for block in blocks]


@pytest.mark.parametrize("text", [GUIDE, NPU], ids=["strix-halo", "npu"])
def test_every_row_with_a_figure_has_a_mark(text: str) -> None:
    changes = text.find("## What changed")
    rows = [row for table in _tables(text[: changes if changes > 0 else None]) for row in table]
    figures = [row for row in rows if re.search(r"\d", row) and not row.startswith("| [")]
    assert len(figures) > 5
    assert [row for row in figures if not MARK.search(row)] == []


def test_every_change_against_the_first_guide_has_a_reason() -> None:
    rows = _tables(GUIDE[GUIDE.find("## What changed") :])[0]
    assert len(rows) >= 20
    assert all(
        len([cell for cell in row.strip("|").split("|") if cell.strip()]) == 3 for row in rows
    )


def test_the_guide_names_what_is_installed() -> None:
    assert f'--index-url {ROCM_INDEX} "{ROCM_TORCH}"' in GUIDE
    assert f"ttm.pages_limit={109 * 2**18} " in GUIDE
    assert BAD_FIRMWARE in GUIDE


def test_the_guide_never_claims_a_test_on_the_machine() -> None:
    assert "Nothing on this page was run on a Strix Halo" in GUIDE
    assert not re.search(r"tested on (a )?strix halo", GUIDE + NPU, re.IGNORECASE)


def test_links_between_pages_lead_to_files() -> None:
    for text in (GUIDE, NPU):
        for target in re.findall(r"\]\(([\w-]+\.md)\)", text):
            assert (DOCS / target).is_file(), target


def test_boards_and_checks_have_names_of_their_own() -> None:
    for rows in (BOARDS, CHECKS):
        names = [row.name for row in rows]
        assert len(names) == len(set(names))


def test_the_page_of_recipes_is_what_is_planned() -> None:
    """One row of it: `python dev/recipe_table.py strix-halo-128 > docs/recipes.md` makes all."""
    name, page = "gemma-3-1b-lora", (DOCS / "recipes.md").read_text()
    row = runpy.run_path(str(REPOSITORY / "dev/recipe_table.py"))["row"]
    assert row(name, plan_figures(load_recipe(name), "strix-halo-128")) in page.splitlines()
