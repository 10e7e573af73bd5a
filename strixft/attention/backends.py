"""`BACKENDS`: implementations of attention, the fastest first.

A device takes the one that is measured there to be right and fast (`strixft.probe`). A machine that
is only planned for takes the first that nothing speaks against.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from strixft.support.tables import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBackend:
    """One implementation of attention, with the form of its mask."""

    name: str
    packed: bool
    """Several documents in one row, closed off from each other."""
    mask: Literal["lengths", "blocks", "dense", "none"]
    """Given to the layers: cumulative lengths, a block mask, T × T truths, or nothing."""
    devices: tuple[str, ...]
    """Device types that compute its gradients."""
    implementation: str = "strixft"
    """Its name among `core.FUNCTIONS` and in transformers' attention interface."""
    module: str = "strixft.attention.core"
    """The module that adds it to `core.FUNCTIONS` when it is imported."""
    kernels: str | None = None
    """Flash kernels of a package, as torch's registry calls them; None for torch's own."""
    package: str | None = None
    """The package with these kernels; it need not be installed."""
    keeps_scores: bool = False
    """Memory grows with T × T of every head, so it gives way to all that keep less."""
    caps_scores: bool = False
    """Knows tanh-capped scores (Gemma 2); the others would leave the cap out."""
    knows_sinks: bool = False
    """Knows learned sinks (gpt-oss); the others would leave them out."""
    why: str
    source: str


BACKENDS: Table[AttentionBackend] = Table(
    "attention",
    AttentionBackend(
        name="varlen-fa4",
        packed=True,
        mask="lengths",
        devices=("cuda",),
        kernels="FA4",
        package="flash-attn-4",
        why="varlen with the kernels of FlashAttention-4, which Hopper and Blackwell have",
        source="torch.nn.attention.activate_flash_attention_impl; PyPI flash-attn-4",
    ),
    AttentionBackend(
        name="varlen",
        packed=True,
        mask="lengths",
        devices=("cuda",),
        knows_sinks=True,
        why="flash attention over documents laid end to end; nothing is computed between them",
        source="torch `aten._flash_attention_forward` with cumulative lengths, arXiv:2307.08691",
    ),
    AttentionBackend(
        name="flex",
        packed=True,
        mask="blocks",
        devices=("cuda",),
        caps_scores=True,
        knows_sinks=True,
        why="a generated kernel that skips blocks between documents; it knows tanh-capped scores",
        source="torch.nn.attention.flex_attention; it has no gradients on a CPU (torch 2.13)",
    ),
    AttentionBackend(
        name="sdpa-packed",
        packed=True,
        mask="dense",
        devices=("cuda", "cpu"),
        why="scaled_dot_product_attention with a T × T mask: right everywhere, wasteful",
        source="torch.nn.functional.scaled_dot_product_attention",
    ),
    AttentionBackend(
        name="sdpa",
        packed=False,
        mask="none",
        devices=("cuda", "cpu"),
        why="one chat a row, rows of like length together, padded",
        source="torch.nn.functional.scaled_dot_product_attention, is_causal",
    ),
    AttentionBackend(
        name="eager",
        packed=True,
        mask="dense",
        devices=("cuda", "cpu"),
        implementation="strixft-eager",
        keeps_scores=True,
        caps_scores=True,
        knows_sinks=True,
        why="plain products and softmax; keeps T × T scores of every head",
        source="arXiv:1706.03762",
    ),
    AttentionBackend(
        name="eager-rows",
        packed=False,
        mask="none",
        devices=("cuda", "cpu"),
        implementation="strixft-eager",
        keeps_scores=True,
        caps_scores=True,
        knows_sinks=True,
        why="the same with one chat a row, where documents cannot share one",
        source="arXiv:1706.03762",
    ),
)

CARRIES_ON = "its layers would carry on from one document of a row to the next"

LARGEST_FLASH_HEAD = 256
"""torch 2.11 ATen/native/transformers/sdp_utils: flash attention takes heads up to this size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The attention that a model needs."""

    model_type: str
    head_size: int
    query_heads: int
    key_heads: int
    """Keys and values have fewer heads than queries where heads are grouped."""
    softcap: float | None
    """Scores are softcap × tanh(scores / softcap)."""
    windowed: bool
    """Some layers look back only so far."""
    sinks: bool = False
    """Some layers have learned sinks."""
    carries_state: bool = False
    """Some layers are not attention, or take no positions: documents cannot share a row."""
    own_attention: bool = False
    """The model's own code computes attention, and knows of no documents in a row."""
    value_size: int | None = None
    """Size of values that have another one than queries and keys."""
    mask_alone: bool = False
    """Only a mask says what layers look back to: chunks, or a window that they do not pass on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownBad:
    """A case that is reported to fail; a measurement on the device itself overrules it."""

    device: str
    backends: tuple[str, ...]
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
        backends=_AOTRITON,
        model_types=("gemma3", "gemma3_text"),
        what="loss NaN from the first step in Gemma 3",
        source="unslothai/unsloth#3385, PR #3588",
    ),
    KnownBad(
        device="gfx1151",
        backends=_AOTRITON,
        model_types=("qwen3_5", "qwen3_5_text"),
        what="crash in Qwen3.5",
        source="h34v3nzc0dex/strix-halo-llm-finetune-guide: README.md",
    ),
    KnownBad(
        device="gfx1151",
        backends=_AOTRITON,
        head_sizes=(72,),
        what="NaN in 59 % of the cases in bf16",
        source="ROCm/aotriton#179",
    ),
)


def _is_missing(package: str | None) -> bool:
    try:
        return package is not None and not metadata.version(package)
    except metadata.PackageNotFoundError:
        return True


def cannot(backend: AttentionBackend, heads: Heads, device_type: str) -> str | None:
    """Return why a backend cannot train a model on a type of device, `cuda` or `cpu`; or None."""
    if device_type not in backend.devices:
        return f"no gradients on {device_type}"
    if heads.own_attention and backend.name != "eager-rows":
        return "the model computes attention by code of its own"
    if _is_missing(backend.package):
        return f"{backend.package} is not installed"
    if backend.packed and heads.carries_state:
        return CARRIES_ON
    if heads.softcap is not None and not backend.caps_scores:
        return "leaves out the cap of the scores"
    if heads.sinks and not backend.knows_sinks:
        return "leaves out learned sinks"
    if backend.mask == "lengths" and heads.head_size > LARGEST_FLASH_HEAD:
        return f"heads of {heads.head_size} are too large for flash attention"
    if backend.mask in ("lengths", "blocks") and heads.mask_alone:
        return "only a mask of all tokens says what layers look back to"
    return None


def known_bad(backend: AttentionBackend, heads: Heads, device: str) -> KnownBad | None:
    """Return the report against a backend on an architecture, such as `gfx1151`; or None."""
    for bad in KNOWN_BAD:
        of_model = heads.model_type in (bad.model_types or (heads.model_type,))
        of_size = heads.head_size in (bad.head_sizes or (heads.head_size,))
        if bad.device == device and backend.name in bad.backends and of_model and of_size:
            return bad
    return None


def is_wanted(backend: AttentionBackend, *, packing: bool) -> bool:
    """Tell whether a recipe that packs its rows, or does not, may take a backend."""
    return packing or not backend.packed


def known_backends(
    heads: Heads, device_type: str, device: str = "", *, packing: bool = True
) -> list[AttentionBackend]:
    """Return the backends that nothing speaks against before anything is measured, the best first.

    Args:
        heads: The attention that the model needs.
        device_type: `cuda` or `cpu`.
        device: Architecture, such as `gfx1151`.
        packing: The recipe wants packed rows.
    """
    return [
        backend
        for backend in BACKENDS.values()
        if backend.package is None  # its kernels are known to run here once they were tried
        and is_wanted(backend, packing=packing)
        and cannot(backend, heads, device_type) is None
        and known_bad(backend, heads, device) is None
    ]
