"""The first loss beside the model's own, before anything is trained.

The training step packs rows, makes its own masks, compiles layers and cuts the head into chunks.
None of that may change the function. So the loss of each token of a few documents, out of the first
update, is compared with that of the class's own `forward`: each document alone, eager attention,
the model's own head.

Shapes: T tokens of a document, P of them compared, V vocabulary.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from strixft.attention.interface import call_ours
from strixft.data.batches import Batch
from strixft.model.adapter import base_of
from strixft.model.experts import call_routed
from strixft.step.update import TrainingStep
from strixft.support.errors import StageError

DOCUMENTS = 4
"""Documents of a batch that are compared."""

TOKENS = 256
"""Most tokens of a document whose losses are compared: the last that are trained."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.1}
"""Mean difference of a token's loss, in nats. Two right kernels differ by 1e-6, 0.004 and 0.034 on
SmolLM2-135M; documents that see each other by 0.25 and more (dev/LOG.md, 2026-11-30)."""

INT8_TOLERANCE = 0.03
"""The same where inputs of products are rounded to 8 bits, by what else shares their row."""

Span = tuple[int, int]
"""Beginning and end of a document in the batch's rows laid end to end."""


@dataclass(frozen=True, slots=True)
class Document:
    """Losses of one document, as the model itself has them."""

    batch: int
    """Number of its batch."""
    trained: Tensor
    """Its compared tokens among the trained ones of the batch, (P,)."""
    losses: Tensor
    """(P,), float32."""


@dataclass(frozen=True, slots=True)
class Proof:
    """The compared documents, and how far their losses are apart."""

    documents: int
    tokens: int
    loss: float
    """Mean over the compared tokens, as the step has it, in nats."""
    own_loss: float
    """The same as the model itself has it."""
    difference: float
    """Mean difference of a token's loss in the worst document, in nats."""
    tolerance: float


def _spans(batch: Batch) -> list[Span]:
    rows, length = batch["input_ids"].shape
    bounds = batch.get("cu_seq_lens")
    ends = range(0, (rows + 1) * length, length) if bounds is None else bounds.tolist()
    return [(start, end) for start, end in itertools.pairwise(ends) if end > start]


def _keeps_logits(base: Any) -> bool:
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def _longest(base: Any, room_bytes: int) -> int:
    """Return the tokens of the longest document whose scores and logits fit."""
    config = base.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    score = heads * (2 * base.dtype.itemsize + 4)  # eager: scores, their softmax in float32, a copy
    logit = config.vocab_size * (base.dtype.itemsize + 8)  # a copy in float32, its log-softmax
    if _keeps_logits(base):
        return int(math.sqrt(max(0, room_bytes - TOKENS * logit) / score))
    return int((math.sqrt(logit**2 + 4 * score * room_bytes) - logit) / (2 * score))


def _trained(batch: Batch, span: Span) -> Tensor:
    """Return the trained tokens of a span, by their numbers among those of the batch."""
    positions: Tensor = batch["positions"]
    start, end = span
    return ((positions >= start) & (positions < end - 1)).nonzero().flatten()


def _chosen(batch: Batch, most: int) -> list[Span]:
    """Return the longest document, first, last, and one in the middle, cut where too long."""
    cut = [(start, min(end, start + most)) for start, end in _spans(batch)]
    spans = [span for span in cut if len(_trained(batch, span))]
    if not spans:
        return []
    longest = max(spans, key=lambda span: span[1] - span[0])
    found = dict.fromkeys([longest, spans[0], spans[-1], spans[len(spans) // 2]])
    return list(found)[:DOCUMENTS]


def proof_batches(update: Sequence[Batch]) -> list[Batch]:
    """Choose two micro-batches of the first update: the first one and the fullest.

    The first has the longest row of the run, the fullest the most documents.
    """
    fullest = max(update, key=lambda batch: len(_spans(batch)))
    return [update[0]] if fullest is update[0] else [update[0], fullest]


def expected(base: Any, batches: Sequence[Batch], room_bytes: int) -> list[Document]:
    """Return losses of a few documents of each batch, by the model as transformers loads it.

    Args:
        base: The model, before the training step changes anything.
        batches: Micro-batches.
        room_bytes: Memory for the scores and logits of one document.
    """
    most, was_training = _longest(base, room_bytes), base.training
    base.set_attn_implementation("eager")
    base.set_experts_implementation("eager")
    base.eval()
    found = [
        _document(base, number, batch, span)
        for number, batch in enumerate(batches)
        for span in _chosen(batch, most)
    ]
    base.train(was_training)
    call_ours(base)
    call_routed(base)
    return found


@torch.no_grad()
def _document(base: Any, number: int, batch: Batch, span: Span) -> Document:
    trained = _trained(batch, span)[-TOKENS:]
    places = batch["positions"][trained] - span[0]  # in the document; they predict the next token
    end = span[0] + int(places[-1]) + 2  # attention is causal: what follows changes nothing
    ids = batch["input_ids"].flatten()[span[0] : end]  # (T,)
    kept = {"logits_to_keep": places} if _keeps_logits(base) else {}
    logits = base(input_ids=ids.unsqueeze(0), use_cache=False, **kept).logits[0]
    logits = logits if kept else logits[places]  # (P, V)
    wanted = ids[places + 1]
    losses = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
    return Document(number, trained, losses)


def prove(step: TrainingStep, batches: Sequence[Batch], documents: Sequence[Document]) -> Proof:
    """Compare the step's losses with the model's own.

    Args:
        step: With the weights that `documents` were made with.
        batches: Micro-batches.
        documents: Documents of `expected`.

    Raises:
        StageError: They differ by more than rounding, or nothing could be compared.
    """
    if not documents:
        raise StageError(
            "the first update has no trained token whose loss fits into memory, so its loss cannot"
            " be proven",
            fix="--set dataset.max_length=…   smaller",
        )
    found = [step.token_losses(batch) for batch in batches]
    ours = [found[document.batch][document.trained] for document in documents]
    own = [document.losses for document in documents]
    apart = [float((a - b).abs().mean()) for a, b in zip(ours, own, strict=True)]
    base, options = base_of(step.model), step.options
    rounded = INT8_TOLERANCE if getattr(base, "is_loaded_in_8bit", False) else 0.0
    proof = Proof(
        documents=len(documents),
        tokens=sum(map(len, own)),
        loss=float(torch.cat(ours).mean()),
        own_loss=float(torch.cat(own).mean()),
        difference=max(apart, key=lambda one: math.inf if math.isnan(one) else one),
        tolerance=max(TOLERANCE[base.dtype], rounded),
    )
    if proof.difference <= proof.tolerance:
        return proof
    tries = ["another --set train.attention=…"]
    settings: dict[str, Any] = {}
    if options.compiled:
        tries, settings = ["--set train.compile=none", *tries], {"train.compile": "none"}
    if options.backend.packed:
        tries, settings = ["--set dataset.packing=false", *tries], {"dataset.packing": False}
    raise StageError(
        f"the first loss is not the model's own: {proof.loss:.5f} nats a token as it would be"
        f" trained, {proof.own_loss:.5f} by the model's own forward ({proof.documents} documents,"
        f" {proof.tokens} tokens; up to {proof.difference:.2g} apart, rounding is"
        f" {proof.tolerance:g}); nothing was trained",
        fix=f"{', or '.join(tries)}   and --from plan",
        settings=settings,
    )
