"""Forward, loss, backward and update, as planning, training and benchmarks all run them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from strixft.data import Batch
from strixft.families import family_of
from strixft.model import base_of
from strixft.recipe import Train
from strixft.step.loss import chunked_cross_entropy
from strixft.step.tracker import part


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers, in order."""
    layers: nn.ModuleList = base_of(model).get_decoder().layers
    return layers


def set_recompute(model: nn.Module, num_layers: int) -> None:
    """Compute the activations of the first layers again in backward instead of keeping them."""
    layer: Any
    for index, layer in enumerate(decoder_layers(model)):
        layer.gradient_checkpointing = index < num_layers
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def _linear_head_loss(base: Any, batch: Batch) -> Tensor:
    hidden = base.get_decoder()(input_ids=batch["input_ids"], use_cache=False)[0]  # (B, T, C)
    with part("head"):
        chosen = hidden.flatten(0, 1).index_select(0, batch["positions"])  # (K, C)
        del hidden
        softcap = getattr(base.config, "final_logit_softcapping", None)
        head = base.get_output_embeddings()
        return chunked_cross_entropy(chosen, head.weight, batch["labels"], softcap)


def _own_head_loss(base: Any, batch: Batch) -> Tensor:
    logits = base(input_ids=batch["input_ids"], use_cache=False).logits  # (B, T, V)
    with part("head"):
        chosen = logits.flatten(0, 1).index_select(0, batch["positions"])  # (K, V)
        del logits
        return nn.functional.cross_entropy(chosen.float(), batch["labels"], reduction="sum")


def batch_loss(model: nn.Module, batch: Batch, num_trained: int | Tensor) -> Tensor:
    """Loss of a batch: its sum over trained tokens, divided by those of the whole update.

    Args:
        model: What `model.build` gave.
        batch: See `strixft.data.Batch`.
        num_trained: Trained tokens of all batches of the update.
    """
    base = base_of(model)
    linear = family_of(base.config.model_type).head == "linear"
    return (_linear_head_loss if linear else _own_head_loss)(base, batch) / num_trained


class TrainingStep:
    """The training step of one model.

    Args:
        model: What `model.build` gave.
        settings: Optimiser and clipping.
        recomputed_layers: Layers whose activations are not kept.
    """

    def __init__(self, model: nn.Module, settings: Train, *, recomputed_layers: int = 0) -> None:
        self.model = model
        self.settings = settings
        set_recompute(model, recomputed_layers)
        model.train()
        self.optimizer = self._build_optimizer()

    def trainable(self) -> list[nn.Parameter]:
        """Weights that are trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.trainable(),
            lr=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
            fused=True,
        )

    def loss(self, batch: Batch, num_trained: int | Tensor) -> Tensor:
        """Loss of a batch; see `batch_loss`."""
        return batch_loss(self.model, batch, num_trained)

    def update(self, batches: Iterable[Batch]) -> Tensor:
        """One update: every batch forward and backward, clip, step. Returns the loss."""
        batches = list(batches)
        num_trained = sum(len(batch["labels"]) for batch in batches)
        total: Any = 0.0
        for batch in batches:
            loss = self.loss(batch, num_trained)
            loss.backward()
            total = total + loss.detach()
        self.finish()
        return torch.as_tensor(total)

    def finish(self) -> None:
        """Clip, step, forget the gradients."""
        nn.utils.clip_grad_norm_(self.trainable(), self.settings.max_grad_norm)
        with part("optimizer"):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
