"""Imports go down only, lazy ones too."""

import ast
from pathlib import Path

import strixft

FLOORS = [
    ["text", "units", "environment"],
    ["errors", "progress"],
    ["views"],
    ["tables", "servers", "llama", "locks", "stopping", "disk", "memory", "weights"],
    ["hardware", "families", "methods", "formats", "sources", "exports", "download", "child"],
    ["recipe"],
    ["runs"],
    ["opening"],
    ["rates", "comparison", "completions", "gguf"],
    ["data", "attention", "guard", "int8", "config", "checkpoints", "stop"],
    ["architecture"],
    ["loading", "targets"],
    ["model"],
    ["prepare", "step", "mergeable"],
    ["probe"],
    ["plan"],
    ["loop", "proof"],
    ["train"],
    ["evaluate", "bench", "doctor", "mkl"],
    ["export", "chat"],
    ["report"],
    ["pipeline"],
    ["lab"],
    ["cli"],
]
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}
PACKAGE = Path(strixft.__file__).parent


def _module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported(path: Path) -> list[str]:
    """Names of our modules that a file imports, wherever the import stands."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "strixft":
            names += [alias.name for alias in node.names if alias.name in FLOOR]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("strixft."):
            names.append(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if alias.name.startswith("strixft.")]
            names += [name.split(".")[1] for name in ours]
    return names


def test_imports_go_down_only() -> None:
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        module = _module_of(path)
        if module in ("__init__", "__main__"):
            continue
        for name in _imported(path):
            seen += 1
            assert name == module or FLOOR[name] < FLOOR[module], f"{path} imports {name}"
    assert seen > 50


def test_every_module_has_a_floor() -> None:
    modules = {_module_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
    assert modules == set(FLOOR)
