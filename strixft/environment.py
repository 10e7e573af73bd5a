"""What must be set before torch and the hub's library are imported, and is when `strixft` is."""

from __future__ import annotations

import logging
import os
import sys

BEFORE_TORCH = {
    # fused attention on gfx1151 is behind this switch (ROCm/TheRock#1364, ROCm/ROCm#6034)
    "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL": "1",
}
"""Variables by name; what the user has set stays as it is."""
NO_TELEMETRY = "HF_HUB_DISABLE_TELEMETRY"
"""TRL 1.16 tells the hub of each trainer that is made; nobody has asked for that."""


def prepare() -> list[str]:
    """Set what is missing; returns the variables for which it is too late."""
    missing = [name for name in BEFORE_TORCH if name not in os.environ]
    os.environ.update({name: BEFORE_TORCH[name] for name in missing})
    os.environ.setdefault(NO_TELEMETRY, "1")
    # bitsandbytes 0.50 tells every CPU that an optional kernel package is missing
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return missing if "torch" in sys.modules else []
