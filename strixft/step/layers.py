"""Decoder layers: what they keep for backward, and whether they run as generated kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import fx, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import flop_registry

from strixft.model.adapter import decoder_layers
from strixft.step.compiler import allow_recompute
from strixft.support.private_hf import recompute_by
from strixft.support.private_torch import call_of, set_call


def inductor(module: fx.GraphModule, inputs: Any) -> Any:
    """Compile a layer's graph, with our pass over its products."""
    from strixft.step.lowering import compile_graph  # takes a second, and a plan compiles nothing

    return compile_graph(module, inputs)


BACKEND: Any = inductor
"""Compiles the layers; a plan has another backend, which decides alike what is kept."""


PRODUCT_LIBRARIES = ("bitsandbytes", "strixft")
"""Libraries whose operators hold products."""


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the results of products."""
    is_product = operator.overloadpacket in flop_registry or operator.namespace in PRODUCT_LIBRARIES
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


def set_recompute(model: nn.Module, num_layers: int, *, elementwise: bool) -> None:
    """Let eager layers compute activations again in backward instead of keeping them.

    Args:
        model: The model of `model.build`.
        num_layers: The first so many layers compute everything again.
        elementwise: The others compute everything again but products.
    """
    again = partial(checkpoint, use_reentrant=False)
    keep_products = partial(create_selective_checkpoint_contexts, _policy)
    layer: Any
    for index, layer in enumerate(decoder_layers(model)):
        layer.gradient_checkpointing = False
        if index < num_layers:
            recompute_by(layer, again)
        elif elementwise:
            recompute_by(layer, partial(again, context_fn=keep_products))


def compile_layers(model: nn.Module, recomputed_layers: int, *, elementwise: bool) -> None:
    """Run each decoder layer as generated kernels, compiled when it is first called.

    Layers of one kind share their code. The partitioner chooses what is kept for backward: the
    fewest bytes. It spares norms and activations that products need again in backward only where it
    may compute them again.

    Args:
        model: The model of `model.build`.
        recomputed_layers: The first so many layers keep nothing, and are run again in backward.
        elementwise: The others may compute norms and activations again.
    """
    allow_recompute(elementwise=elementwise)
    layer: Any
    for index, layer in enumerate(decoder_layers(model)):
        layer.compile(dynamic=False, backend=BACKEND)
        if index < recomputed_layers:  # around the compiled code, which would take it apart
            set_call(layer, partial(checkpoint, call_of(layer), use_reentrant=False))
