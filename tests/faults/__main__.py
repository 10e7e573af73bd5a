"""Every fault at its full count: `python -m faults [NAME …]` in `tests/`; `make faults`."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
from pathlib import Path

import strixft.app.report
import strixft.evaluate.stage
import strixft.train.stage  # noqa: F401  # forked processes have it then

COUNTS: dict[str, tuple[int, ...]] = {
    "kills": (60,),
    "torn": (20,),
    "pressure": (),
    "disks": (4,),
    "starts": (10,),
    "notebooks": (6,),
    "soak": (5000,),
}
"""Module and function of this folder → its counts."""


def main(names: list[str]) -> None:
    """Run the faults named, or all, and say what each has found."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in names or COUNTS:
        work = getattr(importlib.import_module(f"faults.{name}"), name)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"faults-{name}-") as folder:
            found = work(Path(folder), *COUNTS[name])
        print(f"== {name} {COUNTS[name]}: {found}; {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
