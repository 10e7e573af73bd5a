"""Private names of other packages stand in files of their own, each with its cause and its end."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import strixft

OTHERS = {"torch", "transformers", "peft", "datasets", "accelerate", "trl", "bitsandbytes"}
HOMES = ("support/private_torch.py", "support/private_hf.py")
COMPILER = ("step/compiler.py", "step/lowering.py")
"""The doors to torch's compiler, which has no public interface to its graphs."""
PACKAGE = Path(strixft.__file__).parent
TREES = {
    str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")
}


def _is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def _own_names() -> set[str]:
    """Names that strixft itself gives to functions, classes and attributes."""
    found = {"_repr_html_", "_exit"}  # protocol of IPython; public, in spite of its name
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
                found |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
    return found


OWN = _own_names()


def _used(tree: ast.AST) -> Iterator[str]:
    """Private names of others; operators are named by torch's public table."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] in OTHERS and any(map(_is_private, parts)):
                yield name
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "aten", "torch.ops.aten") and node.attr not in OWN:
                yield f"{owner}.{node.attr}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            word = node.args[1]
            if isinstance(word, ast.Constant) and _is_private(str(word.value)):
                yield str(word.value)


@pytest.mark.parametrize("file", [file for file in TREES if file not in HOMES])
def test_private_names_have_files_of_their_own(file: str) -> None:
    used = list(_used(TREES[file]))
    if file in COMPILER:
        used = [name for name in used if not name.startswith("torch.")]
        assert "This file ends where" in (ast.get_docstring(TREES[file]) or "")
    assert not used


@pytest.mark.parametrize("file", HOMES)
def test_each_has_a_cause_and_an_end(file: str) -> None:
    lines = (PACKAGE / file).read_text().splitlines()
    body = [node for node in TREES[file].body if not isinstance(node, ast.Expr)]
    seen, above = 0, 0
    for node in body:
        end = node.end_lineno or 0
        named = isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("'_")
        if named or list(_used(node)):
            seen += 1
            below = 3 if named else 0
            assert "# End: " in "\n".join(lines[above : end + below]), ast.unparse(node)
        above = end
    assert seen > 5


def test_a_private_name_is_seen() -> None:
    text = """
from torch._inductor import ir
from transformers.utils import _hidden
import peft._secret
module._buffers["x"] = getattr(module, "_parameters")
aten._grouped_mm, self._mine, other._repr_html_, name.__dict__
"""
    assert sorted(_used(ast.parse(text))) == [
        "_parameters", "module._buffers", "peft._secret", "torch._inductor.ir",
        "transformers.utils._hidden",
    ]  # fmt: skip
