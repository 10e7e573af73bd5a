"""What decoder layers keep for backward, and whether they run as generated kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch._functorch import config as partitioner
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import flop_registry

from strixft.model.adapter import decoder_layers


def inductor(module: fx.GraphModule, inputs: Any) -> Any:
    """Compile a layer's graph with our pass over its products."""
    from torch._inductor.compile_fx import compile_fx

    from strixft.step.products import Products

    patches = {"post_grad_custom_post_pass": Products(), "reorder_for_peak_memory": False}
    return compile_fx(module, inputs, config_patches=patches)


BACKEND: Any = inductor
"""Compiles the layers; a plan has another backend, which decides alike what is kept."""


def set_recompute(model: nn.Module, num_layers: int) -> None:
    """Compute the activations of the first layers again in backward instead of keeping them."""
    layer: Any
    for index, layer in enumerate(decoder_layers(model)):
        layer.gradient_checkpointing = index < num_layers
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def _policy(_: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether an operator's result is kept: that of a product is."""
    is_product = func.overloadpacket in flop_registry or func.namespace == "bitsandbytes"
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


def keep_products(model: nn.Module, first: int) -> None:
    """In layers from `first` on, compute everything again in backward but the products."""
    context = partial(create_selective_checkpoint_contexts, _policy)
    layer: Any
    for layer in decoder_layers(model)[first:]:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(
            checkpoint, use_reentrant=False, context_fn=context
        )


def compile_layers(model: nn.Module, recomputed_layers: int, *, elementwise: bool) -> None:
    """Run each decoder layer as generated kernels, compiled when it is first called.

    Layers of one kind share their code. What is kept for backward is the partitioner's choice: the
    fewest bytes. It spares norms and activations that products need again in backward only where it
    may compute them again.

    Args:
        model: What `model.build` gave.
        recomputed_layers: The first so many layers keep nothing, and are run again in backward.
        elementwise: Whether the others may compute norms and activations again.
    """
    if partitioner.ban_recompute_materialized_backward == elementwise:
        torch._dynamo.reset()  # what is compiled does not remember it
    partitioner.ban_recompute_materialized_backward = not elementwise
    layer: Any
    for index, layer in enumerate(decoder_layers(model)):
        layer.compile(dynamic=False, backend=BACKEND)
        if index < recomputed_layers:  # around the compiled code, which would take it apart
            layer._compiled_call_impl = partial(
                checkpoint, layer._compiled_call_impl, use_reentrant=False
            )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16)
