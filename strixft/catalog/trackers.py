"""`TRACKERS`: programs that collect the curves of several runs, as `train.trackers` names them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from strixft.support.errors import HostError, RecipeError
from strixft.support.tables import Table


def _wandb_is_local() -> bool:
    return os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")


def _mlflow_is_local() -> bool:
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    return not address.startswith(("http:", "https:", "databricks"))


def _trackio_is_local() -> bool:
    return not os.environ.get("TRACKIO_SPACE_ID")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracker:
    """One receiver of losses."""

    name: str
    modules: tuple[str, ...] = ()
    """Modules of which one has to be installed; empty for our own."""
    is_local: Callable[[], bool] = lambda: True
    """Return whether it leaves the network alone, as the environment is."""
    local: str = ""
    """The change that makes it so."""


TRACKERS: Table[Tracker] = Table(
    "tracker",
    Tracker(name="csv"),
    Tracker(name="tensorboard", modules=("tensorboard", "tensorboardX")),
    Tracker(
        name="trackio",
        modules=("trackio",),
        is_local=_trackio_is_local,
        local="unset TRACKIO_SPACE_ID",
    ),
    Tracker(
        name="wandb",
        modules=("wandb",),
        is_local=_wandb_is_local,
        local="export WANDB_MODE=offline",
    ),
    Tracker(
        name="mlflow",
        modules=("mlflow",),
        is_local=_mlflow_is_local,
        local="unset MLFLOW_TRACKING_URI",
    ),
)


def require_trackers(names: Iterable[str], *, offline: bool) -> None:
    """Check before a night of training that its trackers can run.

    Args:
        names: Of `TRACKERS`.
        offline: The network is not to be used.

    Raises:
        HostError: One is not installed.
        RecipeError: One would use the network.
    """
    for tracker in map(TRACKERS.__getitem__, names):
        if tracker.modules and not any(map(importlib.util.find_spec, tracker.modules)):
            raise HostError(
                f"train.trackers names {tracker.name}, which is not installed",
                fix=f"pip install {tracker.modules[0]}",
            )
        if offline and not tracker.is_local():
            raise RecipeError(
                f"offline is true, and train.trackers: {tracker.name} would use the network",
                fix=f"{tracker.local}, or leave {tracker.name} out of train.trackers",
            )
