"""Adds up the storages that are alive, on `meta` or on a real device.

The sum is rounded as torch's caching allocator does (512 bytes a block), so on a GPU it can be
compared with `torch.cuda.max_memory_allocated`. Buffers inside one operator are not seen.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from strixft.guard.host import device_type
from strixft.support.private_torch import TorchDispatchMode, storage_key, tree_iter

aten = torch.ops.aten

BLOCK = 512
"""Smallest block of torch's caching allocator (c10/core/AllocatorConfig.h, kMinBlockSize)."""

PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "head", "workspace")


_part: ContextVar[str] = ContextVar("part", default="activations")

_counted: ContextVar[bool] = ContextVar("counted", default=True)


def is_counted() -> bool:
    """Return False inside a kernel."""
    return _counted.get()


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Leave out what is allocated in this block: it never leaves a kernel's registers."""
    token = _counted.set(False)
    try:
        yield
    finally:
        _counted.reset(token)


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Count what is allocated in this block to one of `PARTS`."""
    token = _part.set(name)
    try:
        yield
    finally:
        _part.reset(token)


def rounded(num_bytes: int) -> int:
    """Return the bytes of the allocator's block."""
    return -(-num_bytes // BLOCK) * BLOCK


class MemoryTracker(TorchDispatchMode):
    """Counts live bytes by part, and their split at the peak.

    Use as a context manager around the code to watch. Tensors made before are announced with
    `watch` or `watch_model`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.peak_bytes = 0
        self._storages: dict[int, tuple[int, str]] = {}
        self._embedding_gradient: weakref.ref[Tensor] | None = None

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Let torch.compile see through this mode."""
        return True

    @property
    def live_bytes(self) -> int:
        """Bytes alive now."""
        return self.live.total()

    def watch(self, tensor: Tensor, name: str) -> None:
        """Count a tensor's storage under a part, or move it there."""
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        size, old = self._storages.get(key, (rounded(storage.nbytes()), None))
        if old is None:
            weakref.finalize(storage, self._free, key).atexit = False
        else:
            self.live[old] -= size
        self._storages[key] = (size, name)
        self.live[name] += size
        self._note_peak()

    def watch_model(self, model: nn.Module) -> None:
        """Count weights, quantisation constants, buffers; and gradients as they come."""
        for parameter in model.parameters():
            self.watch(parameter, "adapter" if parameter.requires_grad else "weights")
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._watch_gradient)
            self._watch_quantisation(getattr(parameter, "quant_state", None))
        for buffer in model.buffers():
            self.watch(buffer, "weights")

    def _watch_quantisation(self, state: Any) -> None:
        if state is None:
            return
        for value in vars(state).values():
            if isinstance(value, Tensor):
                self.watch(value, "weights")
        self._watch_quantisation(getattr(state, "state2", None))

    def _watch_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.watch(parameter.grad, "gradients")

    def _free(self, key: int) -> None:
        size, name = self._storages.pop(key)
        self.live[name] -= size

    def _note_peak(self) -> None:
        total = self.live.total()
        if total > self.peak_bytes:
            self.peak_bytes = total
            self.peak = dict(self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count what it returns."""
        result = self.run(func, args, kwargs or {})
        if not is_counted():
            return result
        for value in tree_iter(result):
            if isinstance(value, Tensor) and storage_key(value) not in self._storages:
                self.watch(value, _part.get())
        return result

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the operator; the dry run replaces what `meta` cannot answer."""
        if func is aten.add.Tensor and self._adds_embedding_gradient(args):
            return args[0].add_(args[1])
        result = func(*args, **kwargs)
        if func is aten.embedding_dense_backward.default:
            self._embedding_gradient = weakref.ref(result)
        return result

    def _adds_embedding_gradient(self, args: Any) -> bool:
        """Tell whether the two gradients of a tied embedding are added.

        torch does it in place where nothing else holds the first one (torch 2.13,
        csrc/autograd/input_buffer.cpp, can_accumulate_inplace); a dispatch mode does.
        """
        gradient = self._embedding_gradient() if self._embedding_gradient else None
        return gradient is not None and any(argument is gradient for argument in args)


@contextlib.contextmanager
def peak_memory(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield the block's peak memory in bytes: torch's count on a GPU, our tracker's on a CPU.

    Args:
        model: The model that is trained in the block.
    """
    found: dict[str, Any] = dict.fromkeys(("peak_bytes", "reserved_bytes", "peak_parts"))
    if device_type() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield found
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
    else:
        tracker = MemoryTracker()
        tracker.watch_model(model)
        with tracker:
            yield found
        found["peak_bytes"], found["peak_parts"] = tracker.peak_bytes, tracker.peak
    found["resident_bytes"] = psutil.Process().memory_info().rss


def memory_now() -> dict[str, int]:
    """Return the memory that this process holds in bytes: on a GPU by torch, else what is resident.

    The largest since the start counts, as between updates most is free.
    """
    if device_type() == "cuda":
        return {
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    return {"resident_bytes": psutil.Process().memory_info().rss}


def release_memory() -> None:
    """Give back what nothing refers to any more, so that whatever comes next finds it free."""
    gc.collect()
    if device_type() == "cuda":
        torch.cuda.empty_cache()
