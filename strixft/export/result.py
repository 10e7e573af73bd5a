"""`Exported`: the files that an export made, and their comparison with the trained model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from strixft.export.check import LEAST_TOP1, MOST_DIFFERENCE, MOST_KL
from strixft.run.folder import Result, resume_command
from strixft.support import html
from strixft.support.errors import StageError
from strixft.support.text import typed
from strixft.support.units import format_size

CellTable = tuple[list[list[str]], list[str]]
"""Rows and header."""

_MERGED_FIX = "serve the merged folder: --to vllm"

_TEMPLATE_FIX = (
    "give the server a template that it supports: llama-server --jinja --chat-template-file FILE;"
    f" or {_MERGED_FIX}"
)

NOT_ROUNDED = ("f16", "gguf-lora")
"""Files with the weights of the merged model: if they differ, finer ones do not help."""


@dataclass(frozen=True, kw_only=True)
class Exported(Result):
    """Result of the stage: paths of the exports, and their comparison with the trained model."""

    name: ClassVar[str] = "export"

    @property
    def differs(self) -> list[str]:
        """Names of GGUF files that do not answer like the trained model."""
        return [kind for kind, row in self.figures["parity"].items() if not row["passes"]]

    @property
    def quantisations(self) -> tuple[str, ...]:
        """Storage of its GGUF files."""
        gguf = self.figures["made"].get("gguf", {})
        names = (Path(path).stem.rpartition("-")[2] for path in gguf.get("files", []))
        return tuple(self.figures.get("quantisations") or names)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Exports, each GGUF file for itself: `name`, `path`, `bytes` and the command `type`."""
        found = []
        for kind, row in self.figures["made"].items():
            one = {"path": "", "bytes": None, "type": "", **row, "name": kind}
            if kind != "gguf":
                found.append(one)
                continue
            for name, path in zip(self.quantisations, row["files"], strict=False):
                size = Path(path).stat().st_size if Path(path).is_file() else None
                command = f"llama-server --jinja -m {typed(path)}"
                found.append({"name": name, "path": path, "bytes": size, "type": command})
        return found

    def require_parity(self) -> None:
        """Refuse exports that differ from the trained model.

        Raises:
            StageError: It names the differences and their size.
        """
        if not self.differs:
            return
        rows = {kind: self.figures["parity"][kind] for kind in self.differs}
        told = "; ".join(f"{kind}: {_verdict(row)}" for kind, row in rows.items())
        settings: dict[str, Any] = {}
        if any(row["same_template"] is not True for row in rows.values()):
            fix = _TEMPLATE_FIX
        elif not rows.keys().isdisjoint(NOT_ROUNDED) or any(
            row["same_tokens"] < 1 for row in rows.values()
        ):
            fix = _MERGED_FIX
        else:
            command = f"{resume_command(self.folder.parent)} --from export"
            fix = f"{command} --set 'export.gguf=[f16]', or {_MERGED_FIX}"
            settings = {"export.gguf": ["f16"]}
        raise StageError(
            f"the export differs from the trained model; {told}", fix=fix, settings=settings
        )

    def tables(self) -> list[CellTable]:
        """Return tables of the files, of the merged model, and of the comparison."""
        made = [
            [row["name"], row["path"], format_size(row["bytes"]), row["type"]] for row in self.rows
        ]
        found = [
            (made, ["export", "path", "size", "command"]),
            check_table(self.figures["made"]),
            parity_table(self.figures["parity"]),
        ]
        return [(rows, header) for rows, header in found if rows]

    def _repr_html_(self) -> str:
        warnings = "".join(html.warning(f"{kind} differs") for kind in self.differs)
        tables = "".join(html.table(rows, header) for rows, header in self.tables())
        compared = "" if self.figures["parity"] else html.note("Not compared.")
        weights = self.figures.get("weights")  # a run of an older version does not say
        which = html.note(f"Exported: the {weights} weights of the training.") if weights else ""
        return f"{warnings}{tables}{compared}{which}"


def parity_table(parity: Mapping[str, Any]) -> CellTable:
    """Tell how GGUF files answer beside the trained model, from the figures of each."""
    rows = [
        [kind, f"{row['top1']:.3f}", f"{row['greedy']:.3f}", _verdict(row)]
        for kind, row in parity.items()
    ]
    return rows, ["file", "same next token", "same answer", ""]


def check_table(made: Mapping[str, Any]) -> CellTable:
    """Compare the merged model with the trained one; there are no rows if it was not made.

    Args:
        made: Figures of the exports, by kind.
    """
    found = made.get("merged", {}).get("check")
    header = ["merged model beside the trained one", "", "bound"]
    if not found:
        return [], header
    bounds = [f"at most {MOST_DIFFERENCE:g}", "", ""] if found["exact"] else None
    difference, kl, top1 = bounds or ["", f"at most {MOST_KL:g}", f"at least {LEAST_TOP1}"]
    where = ", partly read from disk" if found["offloaded"] else ""
    rounded = made["merged"].get("rounded")
    why = "; ".join(rounded["faults"]) if rounded else ""
    written = f"float32; the base's types would give {why}" if rounded else "the base's types"
    rows = [
        ["merged into", str(made["merged"]["base"]), ""],
        ["written in", written, ""],
        ["rows, tokens", f"{found['rows']}, {found['tokens']}{where}", ""],
        ["largest difference of logits", f"{found['max_difference']:.1e}", difference],
        ["KL, nats a token", f"{found['kl']:.1e}", kl],
        ["same next token", f"{found['top1']:.4f}", top1],
    ]
    return rows, header


def _verdict(row: Mapping[str, Any]) -> str:
    if row["passes"]:
        return "answers like the trained model"
    found = []
    if row["top1"] < row["least_top1"] or row["greedy"] < row["least_greedy"]:
        found.append(
            f"same next token {row['top1']:.3f} (at least {row['least_top1']}),"
            f" same answer {row['greedy']:.3f} (at least {row['least_greedy']})"
        )
    if differently := 1 - row["same_tokens"]:
        found.append(f"its tokenizer splits {differently:.0%} of the prompts differently")
    if row["same_template"] is not True:
        said = f": {row['same_template']}" if row["same_template"] else ""
        found.append(f"llama.cpp cannot express the chat template{said}")
    return "; ".join(found)
