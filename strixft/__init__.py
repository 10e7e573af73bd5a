"""Fine-tuning of language models on machines with unified memory: plan, train, evaluate, report."""

import importlib
from typing import TYPE_CHECKING, Any

from strixft.support import environment

if TYPE_CHECKING:
    from strixft.app.attend import evaluate_recipe as evaluate_recipe
    from strixft.app.attend import export_recipe as export_recipe
    from strixft.app.attend import prepare_recipe as prepare_recipe
    from strixft.app.attend import train_recipe as train_recipe
    from strixft.app.chat_box import chat as chat
    from strixft.app.export_box import exports as exports
    from strixft.app.finish import finish as finish
    from strixft.app.form import start as start
    from strixft.app.lab import list_recipes as list_recipes
    from strixft.app.lab import run_recipe as run_recipe
    from strixft.app.report import write_report as write_report
    from strixft.app.run_box import runs as runs
    from strixft.app.settings import explore_plan as explore_plan
    from strixft.app.watch import watch as watch
    from strixft.bench.page import open_benchmarks as open_benchmarks
    from strixft.bench.page import predict_training as predict_training
    from strixft.bench.run import run_bench as run_bench
    from strixft.doctor.checks import check_host as check_host
    from strixft.plan.result import plan_recipe as plan_recipe
    from strixft.recipe.load import load_recipe as load_recipe
    from strixft.run.open import find_runs as find_runs
    from strixft.run.open import open_run as open_run
    from strixft.support.errors import StrixftError as StrixftError

_HOME = {
    "StrixftError": "support.errors",
    "chat": "app.chat_box",
    "check_host": "doctor.checks",
    "evaluate_recipe": "app.attend",
    "explore_plan": "app.settings",
    "export_recipe": "app.attend",
    "exports": "app.export_box",
    "find_runs": "run.open",
    "finish": "app.finish",
    "list_recipes": "app.lab",
    "load_recipe": "recipe.load",
    "open_benchmarks": "bench.page",
    "open_run": "run.open",
    "plan_recipe": "plan.result",
    "predict_training": "bench.page",
    "prepare_recipe": "app.attend",
    "run_bench": "bench.run",
    "run_recipe": "app.lab",
    "runs": "app.run_box",
    "start": "app.form",
    "train_recipe": "app.attend",
    "watch": "app.watch",
    "write_report": "app.report",
}
"""Public name → module; imported on first use, so that `strixft --help` starts without torch."""

_set_too_late = environment.prepare()
"""Variables that torch did not see, because it was imported before."""

if environment.in_live_notebook():
    importlib.import_module(f"{__name__}.app.cards").show_cards_here()

__version__ = "0.1.0"
__all__ = [*sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
