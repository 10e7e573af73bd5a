"""Set environment variables before torch and the hub's library are imported."""

from __future__ import annotations

import logging
import os
import sys

BEFORE_TORCH = {
    # fused attention on gfx1151 is behind this switch (ROCm/TheRock#1364, ROCm/ROCm#6034)
    "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL": "1",
}
"""Variables by name; a value that the user has set stays."""

OVERRIDE = "HSA_OVERRIDE_GFX_VERSION"

OVERRIDE_WHY = (
    "it claims to be another GPU: 11.0.0 ends in a memory access fault, and every value keeps"
    " gfx1151's own kernels away"
)
"""ROCm/ROCm#5824; h34v3nzc0dex/strix-halo-llm-finetune-guide: README.md (measured)."""

NO_TELEMETRY = "HF_HUB_DISABLE_TELEMETRY"
"""TRL 1.16 reports each trainer to the hub without being asked."""

_too_late: list[str] = []


def prepare() -> list[str]:
    """Set missing variables; return those that come too late for a torch already imported."""
    missing = [name for name in BEFORE_TORCH if name not in os.environ]
    os.environ.update({name: BEFORE_TORCH[name] for name in missing})
    os.environ.setdefault(NO_TELEMETRY, "1")
    # bitsandbytes 0.50 warns on every CPU that an optional kernel package is missing
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    _too_late[:] = missing if "torch" in sys.modules else []
    return _too_late


def seen_by_torch() -> dict[str, str | None]:
    """Return the variables as torch saw them at its import; None for those set too late."""
    return {name: None if name in _too_late else os.environ.get(name) for name in BEFORE_TORCH}


SESSION = "JPY_SESSION_NAME"
"""Variable with the notebook's path, in the environment of a Jupyter server's kernels."""


def in_live_notebook() -> bool:
    """Return whether a person sees this kernel's output as it comes.

    A Jupyter server tells the kernels that it starts which notebook is theirs; papermill and
    nbconvert, which start kernels by themselves, do not.
    """
    ipython = sys.modules.get("IPython")
    has_kernel = ipython is not None and hasattr(ipython.get_ipython(), "kernel")
    return has_kernel and SESSION in os.environ
