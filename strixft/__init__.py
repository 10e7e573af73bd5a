"""Fine-tuning of language models on machines with unified memory: plan, train, evaluate, report."""

import importlib
from typing import TYPE_CHECKING, Any

from strixft import environment

if TYPE_CHECKING:
    from strixft.bench import run_bench as run_bench
    from strixft.bench.page import open_benchmarks as open_benchmarks
    from strixft.bench.predicted import predict_training as predict_training
    from strixft.chat import chat_box as chat_box
    from strixft.doctor import check_host as check_host
    from strixft.errors import StrixftError as StrixftError
    from strixft.evaluate import evaluate_recipe as evaluate_recipe
    from strixft.export import export_recipe as export_recipe
    from strixft.lab import list_recipes as list_recipes
    from strixft.lab import run_recipe as run_recipe
    from strixft.opening import find_runs as find_runs
    from strixft.opening import open_run as open_run
    from strixft.plan import explore_plan as explore_plan
    from strixft.plan import plan_recipe as plan_recipe
    from strixft.prepare import prepare_recipe as prepare_recipe
    from strixft.recipe import load_recipe as load_recipe
    from strixft.report import write_report as write_report
    from strixft.train import train_recipe as train_recipe

_HOME = {
    "StrixftError": "errors",
    "chat_box": "chat",
    "check_host": "doctor",
    "evaluate_recipe": "evaluate",
    "explore_plan": "plan",
    "export_recipe": "export",
    "find_runs": "opening",
    "list_recipes": "lab",
    "load_recipe": "recipe",
    "open_benchmarks": "bench.page",
    "open_run": "opening",
    "plan_recipe": "plan",
    "predict_training": "bench.predicted",
    "prepare_recipe": "prepare",
    "run_bench": "bench",
    "run_recipe": "lab",
    "train_recipe": "train",
    "write_report": "report",
}
"""Public name → module; imported on first use, so that `strixft --help` starts without torch."""

_set_too_late = environment.prepare()
"""Variables that torch did not see, because it was imported before."""

__version__ = "0.1.0"
__all__ = [*sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
