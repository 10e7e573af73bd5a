"""Adapters of experts: PEFT's, computed as two thin grouped products.

Shapes: N tokens, E experts, C channels in, D channels out, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor
from torch.nn.functional import pad

from strixft.model.experts import ALIGNED, Factors


class AdaptedExperts(ParamWrapper):  # type: ignore[misc]
    """PEFT's adapter of one parameter of experts, handed on to `routed_experts` as factors."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the experts return, (N, C)."""
        adapters = dict(kwargs.pop("adapters", {}))
        if not self.disable_adapters and not self.merged:
            adapters[self.parameter_name] = self._factors(x.dtype)
        found: Tensor = self.base_layer(x, *args, adapters=adapters, **kwargs)
        return found

    def _factors(self, dtype: torch.dtype) -> Factors:
        (name,) = self.active_adapters
        a, b, experts = self.lora_A[name].weight, self.lora_B[name].weight, self.num_experts
        a = (a.view(experts, -1, a.shape[-1]) * self.scaling[name]).to(dtype)  # (E, R, C)
        b = b.view(len(b), -1, experts).permute(2, 1, 0).to(dtype)  # (E, R, D)
        missing = -a.shape[1] % ALIGNED
        if missing:
            a, b = (pad(one, (0, 0, 0, missing)) for one in (a, b))
        return a.contiguous().mT, b.contiguous()
