"""Imports go down only, between folders and between files, lazy ones too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import strixft

FLOORS = [
    ["support"],
    ["catalog", "formats", "attention"],
    ["recipe"],
    ["run", "model", "data"],
    ["guard", "servers"],
    ["step", "prepare"],
    ["probe"],
    ["plan", "doctor"],
    ["train"],
    ["evaluate", "bench"],
    ["export"],
    ["app"],
]
"""From the ground up; a file imports from its own folder or from a lower floor."""
FLOOR = {folder: level for level, folders in enumerate(FLOORS) for folder in folders}
PACKAGE = Path(strixft.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*/*.py")
    if path.name != "__init__.py"
}


def _named(node: ast.AST) -> Iterator[str]:
    """Names of ours in one import, each as far as it may lead to a file."""
    if isinstance(node, ast.ImportFrom) and node.module:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)


def _imported(path: Path) -> set[str]:
    """Files of ours that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        for name in _named(node):
            ours = name.removeprefix("strixft.")
            found |= {file for file in (ours, ours.rpartition(".")[0]) if file in FILES}
    return found


ARROWS = {file: _imported(path) - {file} for file, path in FILES.items()}


def test_every_folder_has_a_floor() -> None:
    assert {file.partition(".")[0] for file in FILES} == set(FLOOR)
    loose = {path.name for path in PACKAGE.glob("*.py")}
    assert loose == {"__init__.py", "__main__.py"}


def test_imports_go_down_only() -> None:
    seen = 0
    for file, targets in ARROWS.items():
        folder = file.partition(".")[0]
        for target in targets:
            seen += 1
            below = target.partition(".")[0]
            assert below == folder or FLOOR[below] < FLOOR[folder], f"{file} imports {target}"
    assert seen > 500


def test_no_file_leads_back_to_itself() -> None:
    assert len(list(TopologicalSorter(ARROWS).static_order())) == len(FILES)


def test_folders_re_export_nothing() -> None:
    for path in PACKAGE.rglob("*/__init__.py"):
        assert len(ast.parse(path.read_text()).body) == 1, path
