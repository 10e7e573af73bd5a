"""What must be set before torch is imported, and is when `strixft` is."""

from __future__ import annotations

import logging
import os
import sys

BEFORE_TORCH = {
    # fused attention on gfx1151 is behind this switch (ROCm/TheRock#1364, ROCm/ROCm#6034)
    "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL": "1",
}
"""Variables by name; what the user has set stays as it is."""


def prepare() -> list[str]:
    """Set what is missing; returns the variables for which it is too late."""
    missing = [name for name in BEFORE_TORCH if name not in os.environ]
    os.environ.update({name: BEFORE_TORCH[name] for name in missing})
    # bitsandbytes 0.50 tells every CPU that an optional kernel package is missing
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return missing if "torch" in sys.modules else []
