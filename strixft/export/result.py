"""What an export made and how it compares: as a result of the run, and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from strixft.export.check import LEAST_TOP1, MOST_DIFFERENCE, MOST_KL
from strixft.run.folder import Result, resume_command
from strixft.support import html
from strixft.support.errors import StageError
from strixft.support.units import format_gib

Table = tuple[list[list[str]], list[str]]
"""Rows and header."""

_TEMPLATE_FIX = (
    "give the server one that it can: llama-server --jinja --chat-template-file FILE; or serve the"
    " merged folder: --to vllm"
)

NOT_ROUNDED = ("f16", "gguf-lora")
"""Files whose weights are those of the merged model: if they differ, finer ones do not help."""

_MERGED_FIX = "serve the merged folder: --to vllm"


@dataclass(frozen=True, kw_only=True)
class Exported(Result):
    """Where the exports lie, and how they compare with the trained model."""

    name: ClassVar[str] = "export"

    @property
    def differs(self) -> list[str]:
        """GGUF files that do not answer like the trained model."""
        return [kind for kind, row in self.figures["parity"].items() if not row["passes"]]

    def require_parity(self) -> None:
        """Raise if an export differs.

        Raises:
            StageError: With what differs, and by how much.
        """
        if not self.differs:
            return
        rows = {kind: self.figures["parity"][kind] for kind in self.differs}
        told = "; ".join(f"{kind}: {_told(row)}" for kind, row in rows.items())
        raise StageError(f"the export differs from the trained model; {told}", fix=self._fix(rows))

    def _fix(self, differing: Mapping[str, Any]) -> str:
        if any(row["same_template"] is not True for row in differing.values()):
            return _TEMPLATE_FIX
        rounded = differing.keys().isdisjoint(NOT_ROUNDED)
        if not rounded or any(row["same_tokens"] < 1 for row in differing.values()):
            return _MERGED_FIX
        command = f"{resume_command(self.folder.parent)} --from export"
        return f"{command} --set 'export.gguf=[f16]', or {_MERGED_FIX}"

    def tables(self) -> list[Table]:
        """What was made; the merged model and the files beside the trained model."""
        made = [
            [kind, row.get("path", ""), format_gib(row.get("bytes")), row.get("type", "")]
            for kind, row in self.figures["made"].items()
        ]
        parity = [
            [kind, f"{row['top1']:.3f}", f"{row['greedy']:.3f}", _told(row)]
            for kind, row in self.figures["parity"].items()
        ]
        found = [
            (made, ["export", "where", "size", "type this"]),
            check_table(self.figures["made"]),
            (parity, ["file", "same next token", "same answer", ""]),
        ]
        return [(rows, header) for rows, header in found if rows]

    def _repr_html_(self) -> str:
        warnings = "".join(html.warning(f"{kind} differs") for kind in self.differs)
        tables = "".join(html.table(rows, header) for rows, header in self.tables())
        compared = "" if self.figures["parity"] else html.note("Not compared.")
        return f"{warnings}{tables}{compared}"


def check_table(made: Mapping[str, Any]) -> Table:
    """The merged model beside the trained one; no rows if none was made.

    Args:
        made: Figures of what was made, by kind.
    """
    found = made.get("merged", {}).get("check")
    header = ["merged model beside the trained one", "", "bound"]
    if not found:
        return [], header
    bounds = [f"at most {MOST_DIFFERENCE:g}", "", ""] if found["exact"] else None
    difference, kl, top1 = bounds or ["", f"at most {MOST_KL:g}", f"at least {LEAST_TOP1}"]
    where = ", a part of it read from disk" if found["offloaded"] else ""
    rounded = made["merged"].get("rounded")
    why = "; ".join(rounded["faults"]) if rounded else ""
    written = f"float32; in the base's types: {why}" if rounded else "the base's types"
    rows = [
        ["merged into", str(made["merged"]["base"]), ""],
        ["written in", written, ""],
        ["rows, tokens", f"{found['rows']}, {found['tokens']}{where}", ""],
        ["largest difference of logits", f"{found['max_difference']:.1e}", difference],
        ["KL, nats a token", f"{found['kl']:.1e}", kl],
        ["same next token", f"{found['top1']:.4f}", top1],
    ]
    return rows, header


def _told(row: Mapping[str, Any]) -> str:
    if row["passes"]:
        return "answers like the trained model"
    found = []
    if row["top1"] < row["least_top1"] or row["greedy"] < row["least_greedy"]:
        found.append(
            f"same next token {row['top1']:.3f} (at least {row['least_top1']}),"
            f" same answer {row['greedy']:.3f} (at least {row['least_greedy']})"
        )
    if row["same_tokens"] < 1:
        found.append(f"its tokenizer cuts {1 - row['same_tokens']:.0%} of the prompts differently")
    if row["same_template"] is not True:
        said = f": {row['same_template']}" if row["same_template"] else ""
        found.append(f"llama.cpp cannot express the chat template{said}")
    return "; ".join(found)
