"""What the plan predicts for recipes on a host, in the columns of published training figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from strixft import views
from strixft.bench.page import Html
from strixft.bench.roofline import FLOP_PER_TOKEN, compute_ceiling
from strixft.bench.weights import weights_of
from strixft.families import MODELS
from strixft.hardware import HOSTS
from strixft.plan import plan_figures
from strixft.progress import progress_bar
from strixft.recipe import load_recipe
from strixft.units import format_figure, format_number, format_seconds

SHOWN = 120
"""Characters of the reason for which a recipe could not be planned."""
HEADER = ["recipe", "host", "GB", "a million tokens", "tokens/s", "share", "mark"]


def _share(model: str, method: str, host: str, tok_per_s: float | None) -> float | None:
    """Of the host's matrix rate."""
    if model not in MODELS or tok_per_s is None:
        return None
    weights = weights_of(model, MODELS[model].sides, MODELS[model].source)
    flop = FLOP_PER_TOKEN["full" if method == "full" else "adapter"]
    ceiling = compute_ceiling(HOSTS[host], weights.read_parameters, flop)
    return ceiling.share(tok_per_s) if ceiling else None


def _row(name: str, host: str) -> list[Any]:
    recipe = load_recipe(name)
    try:
        figures = plan_figures(recipe, host)
    except Exception as error:  # the other recipes' rows are still worth showing
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return [name, host, f"not planned: {reason[:SHOWN]}", *["–"] * (len(HEADER) - 3)]
    rate = figures["tok_per_s"]
    memory = f"{figures['peak_bytes'] / 1e9:.1f}" + ("" if figures["fits"] else ", does not fit")
    return [
        name,
        host,
        memory,
        format_seconds(1e6 / rate if rate else None),
        format_number(rate, 0),
        format_figure(_share(recipe.model, recipe.method, host, rate)),
        "predicted",
    ]


def predict_training(recipes: Iterable[str], host: str = "strix-halo-128") -> Html:
    """Plan recipes for a host; some ten seconds each. Nothing of it is measured.

    Args:
        recipes: Their names.
        host: A row of `HOSTS`.
    """
    rows = [_row(name, host) for name in progress_bar(list(recipes))]
    return Html(views.table(rows, HEADER))
