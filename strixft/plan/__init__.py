"""The memory-fit plan: the training step itself, run on tensors without storage."""

from strixft.plan.choose import DataShape, choose
from strixft.plan.dry_run import DryRun, RowShape, dry_run
from strixft.plan.result import Plan, plan_figures, plan_recipe

__all__ = [
    "DataShape",
    "DryRun",
    "Plan",
    "RowShape",
    "choose",
    "dry_run",
    "plan_figures",
    "plan_recipe",
]
