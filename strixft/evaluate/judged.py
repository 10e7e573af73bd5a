"""The judge's table, for notebook and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from strixft import views
from strixft.evaluate.judge import TIE, Figures, outcome_of
from strixft.units import format_number, format_seconds

SHOWN_ROWS = 8


@dataclass(frozen=True)
class Judged:
    """The verdicts, for notebook and report.

    Args:
        figures: As `judge_answers` gives them.
        answers: The rows that were judged.
    """

    figures: Figures
    answers: Sequence[Mapping[str, Any]]

    def rows(self) -> list[list[str]]:
        """Name and value of what the verdicts come to."""
        found, counts = self.figures, self.figures["outcomes"]
        where = {True: " on the NPU", False: "", None: ""}[found.get("on_npu")]
        rows = [
            ["judge", f"{found.get('model', 'none')}{where}, {found['server']}"],
            ["tuned is better", format_number(counts["tuned"])],
            ["base is better", format_number(counts["base"])],
            ["tie, the same answer included", format_number(counts[TIE] + found["rows_same"])],
            ["the two orders contradict each other", format_number(counts["undecided"])],
            ["no verdict", format_number(found["rows_failed"])],
        ]
        if (share := found["tuned_preferred"]) is not None:
            chance = "" if share["clear"] else ", may be chance"
            interval = f"{share['share']:.2f} ({share['low']:.2f} to {share['high']:.2f}){chance}"
            rows.append(["tuned preferred, 95 % interval", interval])
        if found["agreement"] is not None:
            rows.append(["both orders agree", f"{found['agreement']:.0%}"])
        if found["first_preferred"] is not None:
            rows.append(["the first answer is preferred", f"{found['first_preferred']:.0%}"])
        return [*rows, ["time", format_seconds(found["seconds"])]]

    def _shown(self) -> list[list[object]]:
        pairs = [row for row in self.figures["rows"] if "verdicts" in row]
        return [
            [
                row["row"],
                *(self.answers[row["index"]][name] for name in ("request", "base", "tuned")),
                outcome_of(row["verdicts"]),
                row["verdicts"][0]["reason"],
            ]
            for row in pairs[:SHOWN_ROWS]
        ]

    def _repr_html_(self) -> str:
        found = self.figures
        markup = "".join(map(views.warning, found["warnings"]))
        if found["problem"]:
            done = f"{found['rows_judged']} of {found['rows_asked']} rows were judged"
            markup += views.warning(f"The judge ended early, {done}: {found['problem']}")
        markup += views.table(self.rows())
        header = ["row", "request", "base", "tuned", "better", "the judge's reason"]
        return markup + (views.table(self._shown(), header) if found["rows_judged"] else "")
