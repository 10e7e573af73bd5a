"""The page on reliability names every fault that is played, with its count."""

from conftest import REPOSITORY
from faults.__main__ import COUNTS

PAGE = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_fault_has_a_row_with_its_command() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    for name, counts in COUNTS.items():
        row = next(row for row in rows if f"`python -m faults {name}`" in row)
        assert all(f"{count:,}" in row or name == "soak" for count in counts), name


def test_nothing_is_claimed_of_the_machine() -> None:
    assert "**nothing on this page has run on a gfx1151**" in PAGE
