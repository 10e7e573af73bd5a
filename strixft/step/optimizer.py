"""Optimizers, and AdamW for weights that are kept in bf16: small updates are not lost.

A bf16 weight has 8 significant bits, so an update below 1/512 of it changes nothing. Here the 16
bits that a float32 would have besides are kept in the optimizer's state. The weight is the rounded
value of a float32 master then, at 2 bytes more and not 4. With the second moment in float32
and the first in bf16, training takes 12 bytes a weight in place of the 16 of usual float32 masters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from strixft.recipe.schema import Train
from strixft.support.errors import RecipeError

CHUNK = 2**24
"""Elements that are updated at once: temporaries take 64 MiB each."""


def join(weight: Tensor, low: Tensor) -> Tensor:
    """Return the float32 values whose upper half, rounded, is a bf16 weight.

    Args:
        weight: In bf16, any shape.
        low: The bits that rounding left, as 16-bit integers of the same shape.
    """
    bits = weight.view(torch.int16).to(torch.int32).bitwise_left_shift_(16).add_(low)
    return bits.view(torch.float32)


def split_(master: Tensor, weight: Tensor, low: Tensor) -> None:
    """Write float32 values into a bf16 weight and its low bits, of one shape; see `join`."""
    weight.copy_(master)  # to the nearest
    upper = weight.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    left = master.view(torch.int32).sub(upper)
    low.copy_(left.clamp_(max=2**15 - 1))  # half of a bf16 step is one more: a last bit is lost


class BFloat16AdamW(torch.optim.Optimizer):
    """AdamW over bf16 weights with float32 masters (Loshchilov and Hutter, arXiv:1711.05101).

    Args:
        params: Weights in bf16, or groups of them with their own learning rates.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        betas: Decay of both moments.
        eps: Added to the root of the second moment.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # calls no closure
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            for weight in (weight for weight in group["params"] if weight.grad is not None):
                state = self.state[weight]
                if not state:
                    state["step"] = 0
                    state["low"] = torch.zeros_like(weight, dtype=torch.int16)
                    state["exp_avg"] = torch.zeros_like(weight)
                    state["exp_avg_sq"] = torch.zeros_like(weight, dtype=torch.float32)
                state["step"] += 1
                kept = (state[name] for name in ("low", "exp_avg", "exp_avg_sq"))
                tensors = (weight.data, weight.grad.contiguous(), *kept)
                pieces = (tensor.view(-1).split(CHUNK) for tensor in tensors)
                for chunk in zip(*pieces, strict=True):
                    _update_chunk(chunk, state["step"], group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; torch's own would cast all of it to bf16."""
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for number, saved in state_dict["state"].items():
            weight = weights[number]
            self.state[weight] = {
                name: value.to(weight.device, copy=True) if isinstance(value, Tensor) else value
                for name, value in saved.items()
            }


def _update_chunk(tensors: tuple[Tensor, ...], step: int, group: dict[str, Any]) -> None:
    weight, grad, low, exp_avg, exp_avg_sq = tensors
    beta1, beta2 = group["betas"]
    gradient, master = grad.float(), join(weight, low)
    mean = exp_avg.float().lerp_(gradient, 1 - beta1)
    exp_avg.copy_(mean)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    master.mul_(1 - group["lr"] * group["weight_decay"])
    master.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))
    split_(master, weight, low)


def _groups(named: Mapping[str, nn.Parameter], train: Train) -> list[dict[str, Any]]:
    """Return the trained weights by learning rate: B of an adapter may have its own (LoRA+)."""
    if train.lora_plus_ratio == 1:
        return [{"params": list(named.values())}]
    faster = {name for name in named if ".lora_" in name and ".lora_A." not in name}
    groups = (
        ([w for n, w in named.items() if n not in faster], train.learning_rate),
        ([named[n] for n in named if n in faster], train.learning_rate * train.lora_plus_ratio),
    )
    return [{"params": weights, "lr": rate} for weights, rate in groups if weights]


def build_optimizer(named: Mapping[str, nn.Parameter], train: Train) -> torch.optim.Optimizer:
    """Return the optimizer of a recipe.

    Args:
        named: Trained weights, in bf16 or float32, by their names in the model.
        train: Names the optimizer and its settings.

    Raises:
        RecipeError: Moments in 8 bits are asked for, and the weights are trained in bf16.
    """
    groups, rate, decay = _groups(named, train), train.learning_rate, train.weight_decay
    is_8bit = train.optimizer == "adamw-8bit"
    if any(weight.dtype is torch.bfloat16 for weight in named.values()):
        if is_8bit:
            raise RecipeError(
                "bitsandbytes' AdamW8bit updates bf16 weights in place, which loses updates below"
                " 1/512 of a weight",
                fix="--set train.optimizer=adamw, which keeps 16 more bits of each weight",
                settings={"train.optimizer": "adamw"},
            )
        return BFloat16AdamW(groups, rate, decay)
    if is_8bit:
        from bitsandbytes.optim import AdamW8bit

        found: torch.optim.Optimizer = AdamW8bit(groups, rate, weight_decay=decay)
        return found
    return torch.optim.AdamW(groups, rate, weight_decay=decay, fused=True)
