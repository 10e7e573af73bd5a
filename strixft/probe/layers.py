"""Layers of an architecture: documents that share rows, and kernels, against each document alone.

A model of the configuration's own sizes, but of one layer of each kind, with random weights. The
reference is transformers' own path in float32. Rounding is not guessed: the same path is run in the
type of the training, and its distance from the reference is what rounding may do.

Shapes: N documents, T tokens of all, C hidden sizes.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from strixft.attention.backends import AttentionBackend
from strixft.attention.masks import packed_rows
from strixft.data.batches import Batch, collate, on_device
from strixft.model.architecture import (
    build_shape,
    text_decoder,
    with_layers,
)
from strixft.model.config import first_lines
from strixft.model.experts import call_routed
from strixft.model.kernels import switch_off, takes_documents
from strixft.model.quantised import draw_weights
from strixft.model.targets import is_router
from strixft.support.child import Figures
from strixft.support.private_hf import NAME_OF_CONFIG, calls_attention_by_name

LENGTHS = {"cuda": ((150, 83, 41, 26), (200, 67, 33)), "cpu": ((13, 7, 4), (9, 15))}
"""Tokens of the documents of two rows; no boundary lies where a kernel's block ends."""

VOCABULARY = 1024
"""Most rows of an embedding; each token of the documents is another one."""

LARGEST = {"cuda": 2**32, "cpu": 2**26}
"""Most weights that are tried: 24 GiB in bf16 and float32, and a second of a CPU."""

SMALL = 2**20
"""Largest weight whose gradient is compared; those of larger ones are sums over the same tokens."""

ROUNDINGS = 4.0
"""Times the distance of two right paths that is allowed."""

LEAST = 1e-3
"""Least that is allowed. Seen in float32, in 18 architectures: up to 8e-5 where all is right,
1.0 and more where a state or a convolution reaches over a boundary."""

Results = dict[str, Tensor]
"""`hidden` and `tokens`, the gradients of the embedded tokens, (T, C); and gradients of weights by
name; all in float32."""


@dataclass
class _Call:
    """One call of the decoder."""

    ids: Tensor
    """(B, T)."""
    places: Tensor
    """Places of the documents' tokens in the call's rows laid end to end."""
    batch: Batch = field(default_factory=dict)
    backend: AttentionBackend | None = None

    def hidden(self, decoder: Any) -> Tensor:
        """Return hidden states of the documents' tokens, in order, (T, C)."""
        inputs: Any = contextlib.nullcontext({})
        if self.backend is not None:
            numbered = takes_documents(decoder)
            inputs = packed_rows(self.backend, self.batch, numbered=numbered)
        with inputs as options:
            found = decoder(input_ids=self.ids, use_cache=False, **options)[0]
        chosen: Tensor = found.flatten(0, 1)[self.places]
        return chosen.float()


def _documents(device: str, most: int) -> list[list[Tensor]]:
    """Return two rows of documents; no two tokens are the same one."""
    ids = torch.randperm(most, generator=torch.Generator().manual_seed(0))
    rows, start = [], 0
    for lengths in LENGTHS[device]:
        row = []
        for length in lengths:
            row.append(ids[torch.arange(start, start + length) % most])
            start += length
        rows.append(row)
    return rows


def _alone(rows: Sequence[Sequence[Tensor]], device: str) -> list[_Call]:
    return [
        _Call(one.unsqueeze(0).to(device), torch.arange(len(one), device=device))
        for row in rows
        for one in row
    ]


def _together(
    rows: Sequence[Sequence[Tensor]], backend: AttentionBackend, device: str
) -> list[_Call]:
    """Return the call of a training step: packed rows, or one document a row, padded."""
    filled = rows if backend.packed else [[one] for row in rows for one in row]
    batch = collate(
        [
            {
                "input_ids": torch.cat(list(row)).numpy(),
                "trained": np.ones(sum(map(len, row)), dtype=bool),
                **({"lengths": [len(one) for one in row]} if backend.packed else {}),
            }
            for row in filled
        ]
    )
    width = batch["input_ids"].shape[1]
    places = [
        torch.arange(sum(map(len, row))) + number * width for number, row in enumerate(filled)
    ]
    batch = on_device(batch, device)
    return [_Call(batch["input_ids"], torch.cat(places).to(device), batch, backend)]


def _results(decoder: Any, calls: Sequence[_Call]) -> Results:
    """Run calls forward and backward."""
    decoder.zero_grad(set_to_none=True)
    draw, hidden = torch.Generator().manual_seed(1), []
    for call in calls:
        found = call.hidden(decoder)
        gradient = torch.randn(found.shape, generator=draw).to(found.device)
        (found * gradient).sum().backward()
        hidden.append(found.detach())
    embedding = decoder.get_input_embeddings().weight
    ids = torch.cat([call.ids.flatten()[call.places] for call in calls])
    weights = {
        name: weight.grad.float()
        for name, weight in decoder.named_parameters()
        if weight.grad is not None and weight is not embedding
    }
    return {"hidden": torch.cat(hidden), "tokens": embedding.grad[ids].float(), **weights}


def _errors(found: Results, due: Results) -> dict[str, float]:
    """Return the largest error of a token's hidden state, of its gradient, and of a weight's."""
    errors = {}
    for name in ("hidden", "tokens"):
        typical = due[name].square().sum(-1).mean().sqrt()
        errors[name] = float((found[name] - due[name]).norm(dim=-1).max() / typical)
    weights = due.keys() - errors.keys()
    least = 1e-3 * max((float(due[name].norm()) for name in weights), default=1.0)
    errors["weights"] = max(
        (
            _finite(float((found[name] - due[name]).norm()) / max(float(due[name].norm()), least))
            for name in weights
        ),
        default=0.0,
    )
    return errors


_SAID = {
    "hidden": "hidden states",
    "tokens": "gradients of tokens",
    "weights": "gradients of weights",
}


def _judged(errors: Mapping[str, float], rounding: Mapping[str, float]) -> Figures:
    allowed = {name: LEAST + ROUNDINGS * rounding[name] for name in errors}
    worst = max(errors, key=lambda name: _finite(errors[name]) / allowed[name])
    figures: Figures = {
        "error": errors[worst] if errors[worst] < float("inf") else None,
        "allowed_error": allowed[worst],
    }
    if not errors[worst] <= allowed[worst]:  # NaN is not less
        figures["problem"] = (
            f"{_SAID[worst]} are off by {errors[worst]:.2g} of their length from those of each"
            f" document alone, {allowed[worst]:.2g} is rounding"
        )
    return figures


def _finite(error: float) -> float:
    return error if error < float("inf") else float("inf")


def plain_config(config: Any) -> dict[str, Any]:
    """Return what a configuration says of the layers, as plain data."""
    left_out = ("transformers_version", "quantization_config", "architectures", "dtype")
    said = {name: value for name, value in config.to_dict().items() if name not in left_out}
    said.pop(NAME_OF_CONFIG, None)
    plain: dict[str, Any] = json.loads(json.dumps(said, default=str))
    return plain


def _few_layers(config: Any, layers: Sequence[int], dtype: torch.dtype) -> Any:
    """Return the decoder on `meta`, with few layers and a small vocabulary."""
    with torch.device("meta"):
        model = build_shape(config, dtype)
    decoder = text_decoder(with_layers(model, layers)).eval()  # drops no values
    for module in decoder.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # its row would get no gradient
            if len(module.weight) > VOCABULARY:
                small = torch.empty(VOCABULARY, module.embedding_dim, dtype=dtype, device="meta")
                module.weight, module.num_embeddings = nn.Parameter(small), VOCABULARY
    return decoder


@torch.no_grad()
def _draw(decoder: Any, device: str) -> None:
    """Draw weights that hand on what they are given: products keep the length of their input.

    All experts are alike, as rounding may choose another one.
    """
    draw_weights(decoder, device)
    embedding = decoder.get_input_embeddings().weight
    for name, weight in decoder.named_parameters():
        weight.requires_grad_(weight is embedding or weight.numel() < SMALL)
        if weight.ndim < 2:
            weight.normal_(0.5, 0.1)
        elif weight is not embedding:
            weight.normal_(0, weight[0].numel() ** -0.5 if weight.ndim == 2 else 0.5)
        if is_router(name.rpartition(".")[0], decoder):
            weight.zero_()
        elif "experts" in name.split(".") and weight.ndim == 3:
            weight.copy_(weight[:1].mul(weight.shape[-1] ** -0.5).expand_as(weight).clone())


@contextlib.contextmanager
def _without_kernels(packages: Collection[str]) -> Iterator[None]:
    switch_off(packages)
    try:
        yield
    finally:
        switch_off(())


def _plainly(decoder: Any, calls: Sequence[_Call], off: Collection[str]) -> Results:
    """Run calls by transformers' own path."""
    if calls_attention_by_name(decoder):
        decoder.set_attn_implementation("eager")
    decoder.set_experts_implementation("eager")
    with _without_kernels(off):
        return _results(decoder, calls)


def measure_layers(
    config: Mapping[str, Any],
    layers: Sequence[int],
    backend: Mapping[str, Any],
    device: str,
    dtype: str,
    kernels: Sequence[str] = (),
    off: Sequence[str] = (),
) -> Figures:
    """Run a training step's forward and backward pass, and compare it with documents alone.

    Args:
        config: `plain_config` of the model.
        layers: Those of its layers that are tried.
        backend: A row of `BACKENDS`, as plain data; whether rows are packed is in it.
        device: `cuda` or `cpu`.
        dtype: Such as `bfloat16`.
        kernels: Packages with kernels that its layers would take.
        off: Those that are not taken.

    Returns:
        `error` and `allowed_error` of what is worst; a `problem` if it is wrong; or why it is
        `untried`.
    """
    from transformers import AutoConfig

    row, kind = AttentionBackend(**backend), getattr(torch, dtype)
    importlib.import_module(row.module)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            decoder = _few_layers(AutoConfig.for_model(**config), layers, kind)
            count = sum(weight.numel() for weight in decoder.parameters())
            if count > LARGEST[device]:
                return {"untried": f"{count / 1e9:.1f} billion weights are too many to try"}
            _draw(decoder, device)
            documents = _documents(device, len(decoder.get_input_embeddings().weight))
            alone = _alone(documents, device)
            due = _plainly(copy.deepcopy(decoder).float(), alone, kernels)
            rounded = _plainly(decoder, alone, kernels)
        except Exception as error:  # whatever a model's code does with random weights
            return {"untried": first_lines(error)}
        return _tried(decoder, _together(documents, row, device), off, due, _errors(rounded, due))


def _tried(
    decoder: Any, calls: list[_Call], off: Sequence[str], due: Results, rounding: dict[str, float]
) -> Figures:
    from strixft.attention.interface import use_backend

    (call,) = calls
    assert call.backend is not None
    use_backend(decoder, call.backend)
    call_routed(decoder)
    try:
        with _without_kernels(off):
            found = _results(decoder, calls)
    except Exception as error:  # a kernel's, too
        return {"problem": first_lines(error), "raised": True}
    return _judged(_errors(found, due), rounding)
