"""The memory-fit plan: the training step itself, run on tensors without storage."""

from strixft.plan.choose import Choice, Planner, choose
from strixft.plan.data_shape import DataShape
from strixft.plan.dry_run import DryRun, Step, dry_run
from strixft.plan.explore import explore_plan
from strixft.plan.result import Plan, plan_figures, plan_recipe, require_fit
from strixft.plan.trace import RowShape

__all__ = [
    "Choice",
    "DataShape",
    "DryRun",
    "Plan",
    "Planner",
    "RowShape",
    "Step",
    "choose",
    "dry_run",
    "explore_plan",
    "plan_figures",
    "plan_recipe",
    "require_fit",
]
