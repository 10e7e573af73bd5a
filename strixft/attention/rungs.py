"""`RUNGS`: ways to compute attention over packed rows, the fastest first.

Which one a device takes is measured there (`strixft bench attention`); where nothing has been
measured, it is the first that nothing speaks against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from strixft.tables import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One way to compute attention."""

    name: str
    packed: bool
    """Several documents in one row, closed off from each other."""
    mask: Literal["lengths", "blocks", "dense", "none"]
    """What the layers are given: cumulative lengths, a block mask, T × T truths, or nothing."""
    devices: tuple[str, ...]
    """Device types that have gradients of it."""
    implementation: str = "strixft"
    """Its name in transformers' attention interface; see `core`."""
    why: str
    source: str


RUNGS: Table[Rung] = Table(
    "attention",
    Rung(
        name="varlen",
        packed=True,
        mask="lengths",
        devices=("cuda",),
        why="flash attention over documents laid end to end; nothing is computed between them",
        source="torch `aten._flash_attention_forward` with cumulative lengths, arXiv:2307.08691",
    ),
    Rung(
        name="flex",
        packed=True,
        mask="blocks",
        devices=("cuda",),
        why="a generated kernel that skips blocks between documents; it knows tanh-capped scores",
        source="torch.nn.attention.flex_attention; it has no gradients on a CPU (torch 2.13)",
    ),
    Rung(
        name="sdpa-packed",
        packed=True,
        mask="dense",
        devices=("cuda", "cpu"),
        why="scaled_dot_product_attention with a T × T mask: right everywhere, wasteful",
        source="torch.nn.functional.scaled_dot_product_attention",
    ),
    Rung(
        name="sdpa",
        packed=False,
        mask="none",
        devices=("cuda", "cpu"),
        why="one chat a row, rows of like length together, padded",
        source="torch.nn.functional.scaled_dot_product_attention, is_causal",
    ),
    Rung(
        name="eager",
        packed=True,
        mask="dense",
        devices=("cuda", "cpu"),
        implementation="strixft-eager",
        why="plain products and softmax; keeps T × T scores of every head",
        source="arXiv:1706.03762",
    ),
)
LADDER = tuple(RUNGS)
"""Names, the fastest first."""

CAPS_SCORES = frozenset({"flex", "eager"})
"""Rungs that know tanh-capped scores (Gemma 2); the others would leave the cap out."""
LARGEST_FLASH_HEAD = 256
"""torch 2.11 ATen/native/transformers/sdp_utils: flash attention takes heads up to this size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownBad:
    """A case that is reported to fail; a measurement on the device itself overrules it."""

    device: str
    rungs: tuple[str, ...]
    model_types: tuple[str, ...] = ()
    """Empty for any."""
    head_sizes: tuple[int, ...] = ()
    """Empty for any."""
    what: str
    source: str


_AOTRITON = ("varlen", "sdpa-packed", "sdpa")
KNOWN_BAD = (
    KnownBad(
        device="gfx1151",
        rungs=_AOTRITON,
        model_types=("gemma3", "gemma3_text"),
        what="loss NaN from the first step in Gemma 3",
        source="unslothai/unsloth#3385, PR #3588",
    ),
    KnownBad(
        device="gfx1151",
        rungs=_AOTRITON,
        model_types=("qwen3_5", "qwen3_5_text"),
        what="crash in Qwen3.5",
        source="h34v3nzc0dex/strix-halo-guide",
    ),
    KnownBad(
        device="gfx1151",
        rungs=_AOTRITON,
        head_sizes=(72,),
        what="NaN in 59 % of the cases in bf16",
        source="ROCm/aotriton#179",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """What attention has to compute in a model."""

    model_type: str
    head_size: int
    capped: bool
    """Scores are capped by tanh."""

    @classmethod
    def of(cls, config: object) -> Heads:
        """Of a model's configuration."""
        text = config.get_text_config()  # type: ignore[attr-defined]
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        capped = getattr(text, "attn_logit_softcapping", None) is not None
        return cls(model_type=text.model_type, head_size=size, capped=capped)


def why_not(rung: Rung, heads: Heads, device_type: str, device: str) -> str | None:
    """What speaks against a rung before anything is measured; None if nothing does.

    Args:
        rung: The way.
        heads: What the model needs.
        device_type: `cuda` or `cpu`.
        device: Architecture, such as `gfx1151`; empty if it does not matter.
    """
    if device_type not in rung.devices:
        return f"no gradients on {device_type}"
    if heads.capped and rung.name not in CAPS_SCORES:
        return "leaves out the cap of the scores"
    if rung.name == "varlen" and heads.head_size > LARGEST_FLASH_HEAD:
        return f"heads of {heads.head_size} are too large for flash attention"
    return next((bad.what for bad in KNOWN_BAD if _applies(bad, rung, heads, device)), None)


def _applies(bad: KnownBad, rung: Rung, heads: Heads, device: str) -> bool:
    return (
        bad.device == device
        and rung.name in bad.rungs
        and (not bad.model_types or heads.model_type in bad.model_types)
        and (not bad.head_sizes or heads.head_size in bad.head_sizes)
    )


def ladder(heads: Heads, device_type: str, device: str = "", *, packing: bool = True) -> list[Rung]:
    """Rungs that nothing speaks against, the first to be tried first; never empty.

    Args:
        heads: What the model needs.
        device_type: `cuda` or `cpu`.
        device: Architecture, such as `gfx1151`.
        packing: Whether the recipe wants packed rows.
    """
    wanted = [rung for rung in RUNGS.values() if packing or rung.name in ("sdpa", "eager")]
    return [rung for rung in wanted if why_not(rung, heads, device_type, device) is None]
