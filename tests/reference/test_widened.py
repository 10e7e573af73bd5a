"""Weights of 16 bits in float32 arithmetic, beside the same weights made float32 first."""

from __future__ import annotations

import copy

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import WriteRecipe
from tiny_models import TINY
from torch import nn
from transformers import AutoConfig

from strixft.export.check import in_float32
from strixft.model.architecture import auto_class
from strixft.model.load import load_base
from strixft.recipe.load import load_recipe

CAST = {
    "falcon_h1", "granitemoehybrid", "jamba", "lfm2_moe", "mamba2", "minimax_m2", "nemotron_h",
    "qwen3_5", "qwen3_5_moe", "qwen3_next",
}  # fmt: skip
"""Their classes round activations to the type of some weights, in both models that are compared."""
IDS = torch.arange(3, 60).unsqueeze(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", sorted(set(TINY) - CAST))
def test_halves_are_computed_like_float32(model_type: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**TINY[model_type])
    model = auto_class(config).from_config(config, dtype=dtype).eval()
    whole = copy.deepcopy(model).float()
    model.set_attn_implementation("eager")
    whole.set_attn_implementation("eager")
    with torch.no_grad():
        rounded, expected = model(IDS).logits, whole(IDS).logits
        with in_float32(model):
            found = model(IDS).logits
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (rounded.float() - expected).abs().max() > 100 * (found - expected).abs().max()


def written_out(model: nn.Module) -> nn.Module:
    """The model with plain float32 layers in place of 4-bit ones."""
    whole = copy.deepcopy(model)
    for name, layer in list(whole.named_modules()):
        if isinstance(layer, Linear4bit):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            layer.weight.quant_state.dtype = torch.float32
            plain.weight.data = dequantize_4bit(layer.weight, layer.weight.quant_state)
            whole.set_submodule(name, plain)
    return nn.Module.float(whole)


def test_4_bit_layers_multiply_in_float32(write_recipe: WriteRecipe) -> None:
    model = load_base(load_recipe(write_recipe(method="qlora")), "cpu", torch.bfloat16).eval()
    whole = written_out(model)
    with torch.no_grad():
        rounded, expected = model(IDS).logits, whole(IDS).logits
        with in_float32(model):
            found = model(IDS).logits
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (rounded.float() - expected).abs().max() > 100 * (found - expected).abs().max()
