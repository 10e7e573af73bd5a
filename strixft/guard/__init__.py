"""Keeps a run inside its budget. On unified memory an over-commit freezes the host."""

from strixft.guard.advice import finite_again, less_memory
from strixft.guard.cap import cap
from strixft.guard.counters import Counters, read_counters
from strixft.guard.hang import HangWatch
from strixft.guard.host import budget_for, device_type, find_host, training_host
from strixft.guard.sleep import awake
from strixft.guard.spikes import loss_spikes
from strixft.guard.watch import MemoryWatch
from strixft.guard.watches import StageWatch, Watches

__all__ = [
    "Counters",
    "HangWatch",
    "MemoryWatch",
    "StageWatch",
    "Watches",
    "awake",
    "budget_for",
    "cap",
    "device_type",
    "find_host",
    "finite_again",
    "less_memory",
    "loss_spikes",
    "read_counters",
    "training_host",
]
