"""What small real steps on this device said about the dry run; kept for the plans to come.

Stored in the cache folder, by host, device, versions and whatever else a trace depends on.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from strixft.disk import cache_folder
from strixft.hardware import Host
from strixft.plan import stored
from strixft.plan.dry_run import DryRun
from strixft.rates import device_name
from strixft.recipe import Recipe
from strixft.runs import write_json

FOLDER = "measured"
SOURCE = "strixft plan --measure, models of {layers} layers, {when}"


@dataclass(frozen=True, slots=True)
class Line:
    """Measured = `factor` × predicted + `offset`."""

    factor: float
    offset: float

    @classmethod
    def through(cls, small: tuple[float, float], large: tuple[float, float]) -> Line:
        """Through two points (predicted, measured).

        Where the larger model did not take more than the smaller one, noise was larger than what
        lies between them: then the line goes through the larger one and nothing.
        """
        (x, y), (far_x, far_y) = small, large
        if far_x <= x or far_y <= y:
            return cls(far_y / far_x, 0.0)
        factor = (far_y - y) / (far_x - x)
        return cls(factor, y - factor * x)

    def at(self, predicted: float, times: int = 1) -> float:
        """What would be measured, `times` the offset."""
        return self.factor * predicted + self.offset * times


@dataclass(frozen=True, slots=True)
class Correction:
    """Corrects a dry run. Memory is never corrected to less: a plan must not promise too much."""

    peak: Line | None = None
    """Bytes allocated; None where the device has no allocator to ask."""
    seconds: Line | None = None
    """Of an update of one micro-batch; None where no time is predicted."""
    source: str = ""

    def bytes_more(self, peak_bytes: int) -> int:
        """What the peak is higher than predicted."""
        return max(0, round(self.peak.at(peak_bytes)) - peak_bytes) if self.peak else 0

    def time(self, seconds: float | None, steps: int) -> float | None:
        """Seconds of an update of so many micro-batches."""
        if seconds is None or self.seconds is None:
            return seconds
        return max(self.seconds.at(seconds, steps), 0.0)

    def of_run(self, run: DryRun) -> DryRun:
        """A dry run, corrected; what the peak is higher stands under `workspace`."""
        more = self.bytes_more(run.peak_bytes)
        return replace(
            run,
            parts={**run.parts, "workspace": run.parts["workspace"] + more},
            reserved_bytes=run.reserved_bytes + more,
            seconds_per_update=self.time(run.seconds_per_update, run.steps),
        )

    def assumptions(self) -> list[dict[str, Any]]:
        """As rows of a plan's assumptions."""
        lines = {"peak in bytes": self.peak, "seconds per micro-batch": self.seconds}
        return [
            {
                "what": f"{name}, measured = factor × predicted + offset",
                "value": f"{line.factor:.4f}, {line.offset:.4g}",
                "mark": "measured",
                "source": self.source,
            }
            for name, line in lines.items()
            if line is not None
        ]


def _path(recipe: Recipe, config: Any, host: Host) -> Path:
    device = device_name(host)
    name = stored.name_of(recipe, config, host, "measured", [host.name, device])
    return cache_folder() / FOLDER / f"{name}.json"


def save_correction(recipe: Recipe, config: Any, host: Host, correction: Correction) -> Path:
    """Keep a correction for all plans of such a step on this device."""
    path = _path(recipe, config, host)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(correction))
    return path


def load_correction(recipe: Recipe, config: Any, host: Host) -> Correction:
    """What was measured for such a step; nothing, where nothing was or the file is damaged."""
    try:
        data = json.loads(_path(recipe, config, host).read_text(encoding="utf-8"))
        lines = {n: Line(**data[n]) if data[n] else None for n in ("peak", "seconds")}
        return Correction(**lines, source=data["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return Correction()
