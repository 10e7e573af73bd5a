"""Rows that a server wrote, as people see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strixft import views
from strixft.prepare.augment import PROVENANCE, read_augmented
from strixft.units import format_number

SHOWN_ROWS = 10


def summary(figures: Mapping[str, Any]) -> str:
    """The counts, the warnings, and why rows are not used."""
    where = " on the NPU" if figures["on_npu"] else ""
    counts = {
        "rows written by": f"{figures['model']}{where}, {figures['server']}",
        "task": figures["task"],
        **{
            words: format_number(figures[name])
            for words, name in (
                ("training rows sent", "rows_sent"),
                ("rows asked for", "rows_asked"),
                ("of these usable", "rows_kept"),
                ("of these trained", "rows_trained"),
            )
        },
    }
    refused = [
        [f"{kind.replace('_', ' ')}: {format_number(found['rows'])}", found["first"]]
        for kind, found in figures["refused"].items()
    ]
    markup = "".join(map(views.warning, figures["warnings"])) + views.mapping(counts)
    return markup + (views.table(refused, ["not used", "the first of them"]) if refused else "")


@dataclass(frozen=True)
class AugmentedRows:
    """The first written rows with their source, for a notebook.

    Args:
        path: The file.
    """

    path: Path

    def rows(self) -> list[list[object]]:
        """File and row that a row comes from, its request and its answer."""
        return [
            [
                f"{Path(row[PROVENANCE]['source']).name}, row {row[PROVENANCE]['row']}",
                *(message["content"] for message in row["messages"][-2:]),
            ]
            for row in read_augmented(self.path, SHOWN_ROWS)
        ]

    def _repr_html_(self) -> str:
        return views.table(self.rows(), ["made of", "request", "answer"])
