"""Parameters that papermill put into a notebook of ours; it runs one that does not exist."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence

from strixft.support.errors import StageError
from strixft.support.tables import did_you_mean

INJECTED = "# Parameters\n"
"""Beginning of the cell that papermill adds."""

OURS = {"recipe", "run_dir", "overrides"}


def cells_run() -> list[str]:
    """Return the source of the cells that this kernel has run; none outside a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return list(shell.user_ns.get("In", [])) if shell else []


def _names(cell: str, kind: type[ast.Assign] | type[ast.AnnAssign]) -> set[str]:
    try:
        found = [node for node in ast.parse(cell).body if isinstance(node, kind)]
    except SyntaxError:  # magics of a person's own notebook
        return set()
    targets = [t for n in found for t in (n.targets if isinstance(n, ast.Assign) else [n.target])]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def refuse_unknown(cells: Sequence[str]) -> None:
    """Refuse parameters that a notebook of ours does not have.

    Args:
        cells: Sources of cells that were run.

    Raises:
        StageError: A parameter does not exist.
    """
    known = next((k for cell in cells if (k := _names(cell, ast.AnnAssign)) >= OURS), None)
    if known is None:
        return
    for cell in cells:
        given = _names(cell, ast.Assign) if cell.startswith(INJECTED) else set()
        for name in sorted(given - known):
            raise StageError(
                f"the notebook has no parameter {name!r}", fix=did_you_mean(name, sorted(known))
            )
