"""Sliders over rows, length and recomputed layers: memory and speed of each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from strixft.catalog.hosts import Budget
from strixft.guard.host import budget_for, find_host
from strixft.model.source import load_config
from strixft.plan.choose import Candidate, Planner
from strixft.plan.data_shape import DataShape
from strixft.prepare.stage import Prepared
from strixft.probe.job import Job
from strixft.run.folder import Run
from strixft.support import html
from strixft.support.units import GIB, format_gib, format_number

SHORTEST = 128
"""Tokens of a row where the slider begins."""

WIDGET = {"continuous_update": False}


@dataclass(frozen=True, slots=True)
class Answer:
    """Memory and speed of a step."""

    peak_bytes: int
    need_bytes: int
    """Reserved, and outside the allocator."""
    tok_per_s: float | None
    fits: bool

    def _repr_html_(self) -> str:
        return html.mapping(
            {
                "fits": "yes" if self.fits else "NO",
                "peak, allocated": format_gib(self.peak_bytes),
                "needed": format_gib(self.need_bytes),
                "tokens per second, predicted": format_number(self.tok_per_s, 1),
            }
        )


class Explorer:
    """Answers for any micro-batch of a recipe; shows itself as sliders, and as a picture.

    Args:
        planner: Of the recipe, on its host.
        limit: What the run may use.
    """

    def __init__(self, planner: Planner, limit: Budget) -> None:
        self._planner, self._limit = planner, limit

    def answer(self, rows: int, length: int, recomputed_layers: int) -> Answer:
        """Return what a step needs: of the data at their full length, of filled rows at another."""
        planner, data = self._planner, self._data(length)
        run = planner.dry_run_of(planner.step_of(data, rows, recomputed_layers))
        need, seconds = planner.need_bytes(run), run.seconds_per_update
        rate = rows * run.steps * data.mean_length() / seconds if seconds else None
        return Answer(run.peak_bytes, need, rate, need <= self._limit.num_bytes)

    def at_least(self, rows: int, length: int, recomputed_layers: int) -> Candidate:
        """Return what a step asks for, quickly: without what the allocator holds beyond."""
        data = self._data(length)
        step = self._planner.step_of(data, rows, recomputed_layers)
        return self._planner.candidate_of(step, data)

    def _at_once(self, **chosen: int) -> str:
        found = self.at_least(**chosen)
        return html.mapping(
            {
                "fits": "…" if found.need_bytes <= self._limit.num_bytes else "NO",
                "needed": f"at least {format_gib(found.need_bytes)}",
                "tokens per second, predicted": format_number(found.tok_per_s, 1),
            }
        )

    def _data(self, length: int) -> DataShape:
        data = self._planner.data
        if length == data.max_length:
            return data
        return DataShape(length, longest=min(data.longest, length))

    def picture(self) -> str:
        """Return a picture of memory against rows; none, half and all layers are recomputed."""
        figure, axes = html.new_figure()
        rows, most = sorted(self._planner.rows()), self._planner.num_layers
        for layers in sorted({0, most // 2, most}):
            need = [self._planner.candidate(count, layers).need_bytes / GIB for count in rows]
            axes.plot(rows, need, marker="o", label=f"{layers} of {most} layers recomputed")
        axes.axhline(self._limit.num_bytes / GIB, color=html.INK, linestyle="--", label="budget")
        axes.set_xscale("log", base=2)
        axes.set_xticks(rows, list(map(str, rows)))
        axes.set_xlabel("rows of a micro-batch")
        axes.set_ylabel("GiB asked for")
        axes.legend(fontsize=7.5, frameon=False)
        return html.picture(figure, "memory against rows and recomputed layers")

    def sliders(self) -> Any:
        """Return three sliders and the answer below them, for a notebook with a kernel."""
        import ipywidgets as widgets

        rows, length = sorted(self._planner.rows()), self._planner.data.max_length
        controls = {
            "rows": widgets.SelectionSlider(options=rows, description="rows", **WIDGET),
            "length": widgets.IntSlider(
                length, min(SHORTEST, length), length, description="tokens", **WIDGET
            ),
            "recomputed_layers": widgets.IntSlider(
                0, 0, self._planner.num_layers, description="recomputed", **WIDGET
            ),
        }
        shown = widgets.HTML()

        def show(_: Any = None) -> None:
            chosen = {name: control.value for name, control in controls.items()}
            shown.value = self._at_once(**chosen)
            shown.value = self.answer(**chosen)._repr_html_()

        for control in controls.values():
            control.observe(show, "value")
        show()
        return widgets.VBox([*controls.values(), shown])

    def _ipython_display_(self) -> None:
        """Show the sliders, and the picture: it stays in a page without a kernel."""
        from IPython.display import HTML, display

        display(HTML(self.picture()), self.sliders())


def explore_plan(run: Run) -> Explorer:
    """Return sliders for a prepared run on its host.

    Args:
        run: The prepared run; its data decide how long rows can be.
    """
    recipe = run.recipe
    job = Job.of(recipe, load_config(recipe), find_host(recipe.memory.host))
    data = DataShape.of(recipe, run.require(Prepared), packed=job.options.backend.packed)
    return Explorer(Planner(job, data), budget_for(recipe.memory, job.host))
