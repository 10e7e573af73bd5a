"""Attention that a model asks for, written down while the model runs without weights.

Shapes: B rows, H heads, T tokens, D head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import masking_utils

from strixft.support.private_torch import storage_key

MaskKind = Literal["causal", "both ways", "other", "unknown"]
"""`other`: causal, with more to it than a window, such as chunks. `unknown`: not made by
transformers' own functions."""

TRIED = 64
"""Tokens back that are tried where there is no window."""


@dataclass(frozen=True, slots=True)
class Mask:
    """The tokens that a token sees."""

    kind: MaskKind
    window: int | None = None
    """Tokens it looks back, itself included; None for all."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of attention."""

    module: int
    """`id` of the attention layer."""
    query_heads: int
    key_heads: int
    head_size: int
    value_size: int
    softcap: float | None
    sinks: bool
    window: int | None
    """Passed on by the layer; a mask may say something else."""
    mask: Mask

    @property
    def asked(self) -> tuple[Any, ...]:
        """All but the layer that asked."""
        return astuple(self)[1:]

    @property
    def cached_numbers(self) -> int:
        """Numbers that are kept of a token where text is written on."""
        return self.key_heads * (self.head_size + self.value_size)


@dataclass
class Watch:
    """Notes masks that are made, and calls of attention."""

    calls: list[AttentionCall] = field(default_factory=list)
    _masks: dict[int, tuple[Tensor, Mask]] = field(default_factory=dict)

    def make_mask(self, options: dict[str, Any]) -> Tensor:
        """Note the tokens that a mask would show; return one to know it by, (B, 1, T, T)."""
        rows, length = options["batch_size"], options["q_length"]
        made = torch.ones(rows, 1, length, length, dtype=torch.bool, device=options["device"])
        self._masks[storage_key(made)] = made, _read_mask(options)
        return made

    def _mask_of(self, mask: Any, module: nn.Module) -> Mask:
        if mask is None:
            return Mask("unknown" if getattr(module, "is_causal", True) else "both ways")
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            return Mask("unknown")
        return self._masks.get(storage_key(mask), (mask, Mask("unknown")))[1]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        options: dict[str, Any],
    ) -> Tensor:
        """Note a call; return an empty result, (B, T, H, D). See `core.attend`."""
        call = AttentionCall(
            module=id(module),
            query_heads=query.shape[1],
            key_heads=key.shape[1],
            head_size=query.shape[-1],
            value_size=value.shape[-1],
            softcap=options.get("softcap"),
            sinks=options.get("s_aux") is not None,
            window=options.get("sliding_window"),
            mask=self._mask_of(mask, module),
        )
        self.calls.append(call)
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])


@contextlib.contextmanager
def documents_unsought() -> Iterator[None]:
    """Keep transformers from looking for documents in the positions.

    It would wait for the device to tell (transformers 5.23, `find_packed_sequence_indices`).
    """
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda _: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


watch: Watch | None = None
"""The watch that notes calls now."""


@contextlib.contextmanager
def watching() -> Iterator[list[AttentionCall]]:
    """Note every call of attention in this block, and compute none."""
    global watch
    before, watch = watch, Watch()
    try:
        with documents_unsought():
            yield watch.calls
    finally:
        watch = before


def _read_mask(options: dict[str, Any]) -> Mask:
    """Find out which tokens a token sees, by asking for some pairs of tokens."""
    sees: Callable[..., Any] = options["mask_function"]
    window = options.get("local_size")
    end = 2 * (window or TRIED) + 3
    queries = sorted({0, 1, (window or TRIED) - 1, window or TRIED, end - 1})
    first = torch.zeros((), dtype=torch.long, device="cpu")
    keys = torch.arange(end, device="cpu")  # (end,)
    try:
        seen = [sees(first, first, torch.tensor(q, device="cpu"), keys) for q in queries]
    except RuntimeError:  # it depends on the row, as Llama 4's chunks do, and that is on meta
        return Mask("other", window)
    rows = [row.expand(end) for row in seen]
    if any(bool(row[q + 1 :].any()) for q, row in zip(queries, rows, strict=True)):
        return Mask("both ways", window)
    plain = [(keys <= q) & (keys > q - (window or end)) for q in queries]
    same = all(torch.equal(row, want) for row, want in zip(rows, plain, strict=True))
    return Mask("causal" if same else "other", window)
