"""Forward, loss, backward and update, as planning, training and benchmarks all run them.

Shapes: B rows of T tokens, of which K are trained; C hidden sizes, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from strixft.attention.backends import BACKENDS, AttentionBackend
from strixft.attention.interface import use_backend
from strixft.attention.masks import packed_rows
from strixft.data.batches import Batch
from strixft.model.adapter import AdapterDropout, base_of
from strixft.model.architecture import Head, linear_head, text_decoder
from strixft.model.kernels import takes_documents
from strixft.recipe.schema import Train
from strixft.step.layers import compile_layers, set_recompute
from strixft.step.loss import chunked_cross_entropy, token_cross_entropy
from strixft.step.memory_tracker import part
from strixft.step.optimizer import build_optimizer


@dataclass(frozen=True, slots=True)
class StepOptions:
    """Options of how a step is computed; none changes the result."""

    attention: str = "sdpa"
    """A row of `BACKENDS`."""
    compiled: bool = False
    """Decoder layers and the loss run as generated kernels."""
    recomputed_layers: int = 0
    """The first so many layers are computed again in backward."""
    elementwise: bool = False
    """In the other layers norms and activations are computed again, and products are kept."""

    @property
    def backend(self) -> AttentionBackend:
        """The row that `attention` names."""
        return BACKENDS[self.attention]


def batch_loss(
    model: nn.Module, batch: Batch, num_trained: int | Tensor, options: StepOptions = StepOptions()
) -> Tensor:
    """Return the loss of a batch, (): its sum over trained tokens, divided by those of the update.

    Args:
        model: The model of `model.build`.
        batch: See `strixft.data.Batch`.
        num_trained: Trained tokens of all batches of the update.
        options: How it is computed.
    """
    return _sum_of_losses(model, batch, options) / num_trained


def _sum_of_losses(
    model: nn.Module, batch: Batch, options: StepOptions, *, detached: bool = False
) -> Tensor:
    """Return the sum of the losses of a batch, (); detached, its head makes no gradients."""
    base = base_of(model)
    if (head := linear_head(base)) is None:
        total = _own_head_losses(base, batch, options, "sum")
        return total.detach() if detached else total
    hidden = _trained_hidden(base, batch, options, head.scale)
    with part("head"):
        weight, bias = _matrix_and_bias(base, hidden.dtype, head)
        if detached:  # what layers kept for backward is freed before there are logits
            hidden, weight = hidden.detach(), weight.detach()
            bias = None if bias is None else bias.detach()
        return chunked_cross_entropy(
            hidden, weight, batch["labels"], head.softcap, bias=bias, compiled=options.compiled
        )


@torch.no_grad()
def token_losses(model: nn.Module, batch: Batch, options: StepOptions = StepOptions()) -> Tensor:
    """Return the loss of each trained token, (K,), in float32; arguments as `batch_loss`."""
    return _token_losses(model, batch, options)


def _token_losses(model: nn.Module, batch: Batch, options: StepOptions) -> Tensor:
    """Return the loss of each trained token, (K,); the forward pass may note gradients."""
    base = base_of(model)
    if (head := linear_head(base)) is None:
        return _own_head_losses(base, batch, options, "none").detach()
    hidden = _trained_hidden(base, batch, options, head.scale).detach()
    weight, bias = _matrix_and_bias(base, hidden.dtype, head)
    return token_cross_entropy(hidden, weight, batch["labels"], head.softcap, bias=bias)


def _matrix_and_bias(base: Any, dtype: torch.dtype, head: Head) -> tuple[Tensor, Tensor | None]:
    """Return the head's matrix, (V, C), and its bias, (V,), times a factor of the head."""
    own = base.get_output_embeddings()
    bias = own.bias
    if bias is not None:
        bias = (bias if head.scale == 1 else bias * head.scale).to(dtype)
    return own.weight.to(dtype), bias


def _trained_hidden(base: Any, batch: Batch, options: StepOptions, scale: float) -> Tensor:
    """Return the hidden states that predict trained tokens, (K, C), times a factor of the head."""
    decoder = text_decoder(base)
    with packed_rows(options.backend, batch, numbered=takes_documents(decoder)) as inputs:
        hidden = decoder(input_ids=batch["input_ids"], use_cache=False, **inputs)[0]
    with part("head"):
        chosen: Tensor = hidden.flatten(0, 1).index_select(0, batch["positions"])
        return chosen if scale == 1 else chosen * scale


def _own_head_losses(base: Any, batch: Batch, options: StepOptions, reduction: str) -> Tensor:
    """Return losses by the model's own head, (K,), or their sum, ()."""
    numbered = takes_documents(text_decoder(base))
    with packed_rows(options.backend, batch, numbered=numbered) as inputs:
        logits = base(input_ids=batch["input_ids"], use_cache=False, **inputs).logits  # (B, T, V)
    with part("head"):
        chosen = logits.flatten(0, 1).index_select(0, batch["positions"])  # (K, V)
        del logits  # B·T rows are more than the K that are trained
        return nn.functional.cross_entropy(chosen.float(), batch["labels"], reduction=reduction)


Loss = Callable[[nn.Module, Batch, "int | Tensor", StepOptions], Tensor]
"""A function like `batch_loss`."""


def _leave_out_dropout(model: nn.Module) -> float:
    """Let training drop no values; return the largest share that the model would have dropped.

    Few attention kernels can drop any, so what is learned would depend on the one that is taken.
    The adapter's own dropout, which the recipe asks for, stays.
    """
    most = 0.0
    for module in model.modules():
        if isinstance(module, AdapterDropout):
            continue
        shares = {name: value for name, value in vars(module).items() if isinstance(value, float)}
        for name, share in shares.items():
            if "drop" in name or (name == "p" and isinstance(module, nn.Dropout)):
                most = max(most, share)
                setattr(module, name, 0.0)
    return most


class TrainingStep:
    """The training step of one model.

    Args:
        model: The model of `model.build`.
        settings: Optimizer and clipping.
        options: How it is computed.
        loss: The function that is minimised.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Train,
        options: StepOptions = StepOptions(),
        loss: Loss = batch_loss,
    ) -> None:
        self.model, self.settings, self.options, self._loss = model, settings, options, loss
        base = base_of(model)
        use_backend(base, options.backend)
        prepare_layers = compile_layers if options.compiled else set_recompute
        prepare_layers(model, options.recomputed_layers, elementwise=options.elementwise)
        model.train()
        self.dropout = _leave_out_dropout(model)
        """The largest share of values that the model would have dropped."""
        self._adapter_dropouts = [m for m in model.modules() if isinstance(m, AdapterDropout)]
        self._trainable = {n: w for n, w in model.named_parameters() if w.requires_grad}
        self.optimizer = build_optimizer(self._trainable, settings)
        is_scaled = base.dtype is torch.float16 and base.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(enabled=is_scaled)
        self.skipped = False
        """The last update was left out: scaled float16 gradients were not finite."""

    def trainable(self) -> list[nn.Parameter]:
        """Return the weights that are trained."""
        return list(self._trainable.values())

    def named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Return the weights that are trained, with the names that the model has for them."""
        return list(self._trainable.items())

    def loss(self, batch: Batch, num_trained: int | Tensor) -> Tensor:
        """Return the loss of a batch, (); see `batch_loss`."""
        return self._loss(self.model, batch, num_trained, self.options)

    def held_out_loss(self, batch: Batch) -> Tensor:
        """Return the sum of the losses of a batch, (), in float32, by the forward pass of training.

        So compiled layers are not compiled again, unless the adapter has dropout, which is off
        here. A batch no larger than those of training needs no more memory than they do.
        """
        for module in self._adapter_dropouts:
            module.eval()
        try:
            return _sum_of_losses(self.model, batch, self.options, detached=True)
        finally:
            for module in self._adapter_dropouts:
                module.train()

    def token_losses(self, batch: Batch) -> Tensor:
        """Return the loss of each trained token of a batch, (K,), in float32.

        The forward pass is that of training: compiled layers need not be compiled again for it.
        """
        return _token_losses(self.model, batch, self.options)

    def update(
        self,
        batches: Sequence[Batch],
        num_trained: int | None = None,
        *,
        after_batch: Callable[[], None] = lambda: None,
        before_step: Callable[[Tensor, Tensor], None] = lambda losses, norm: None,
    ) -> Tensor:
        """Make one update: every batch forward and backward, clip, optimizer step.

        Args:
            batches: Micro-batches.
            num_trained: Trained tokens of the update, over all processes; those of the batches if
                not given.
            after_batch: Called after each micro-batch; an error drops the update.
            before_step: Called with the loss of each micro-batch, (micro-batches,), and the norm of
                the gradient, before any weight changes; an error drops the update.

        Returns:
            The loss, (): mean over trained tokens.
        """
        num_trained = num_trained or sum(len(batch["labels"]) for batch in batches)
        self.optimizer.zero_grad(set_to_none=True)  # of an update that was dropped
        losses: list[Tensor] = []
        for batch in batches:
            loss = self.loss(batch, num_trained)
            self.scaler.scale(loss).backward()
            losses.append(loss.detach())
            after_batch()
        self.finish(losses, before_step)
        return torch.as_tensor(sum(losses))

    def finish(
        self, losses: Sequence[Tensor], before_step: Callable[[Tensor, Tensor], None]
    ) -> None:
        """Let the update be checked, clip, step, forget the gradients.

        Args:
            losses: The loss of each micro-batch, ().
            before_step: See `update`.
        """
        self.scaler.unscale_(self.optimizer)
        gradients = [weight.grad for weight in self.trainable() if weight.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        before_step(torch.stack(list(losses)), norm)
        nn.utils.clip_grads_with_norm_(self.trainable(), self.settings.max_grad_norm, norm)
        with part("optimizer"):
            scale = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.skipped = self.scaler.get_scale() < scale
        self.optimizer.zero_grad(set_to_none=True)
