"""Layers of 8-bit integers: close to the layer they come from, and nothing kept for backward."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import AutoConfig

from strixft.catalog.methods import METHODS
from strixft.catalog.models import MODELS
from strixft.model.load import shape_base
from strixft.model.quantised import Int8Linear, finish_loaded, int8_shape


def layers(channels: int = 256, out: int = 512) -> tuple[nn.Linear, nn.Module]:
    """A layer, and the same one with 8-bit weights."""
    torch.manual_seed(0)
    linear = nn.Linear(channels, out)
    loaded = bnb.nn.Linear8bitLt(channels, out, has_fp16_weights=False)
    loaded.load_state_dict(linear.state_dict())
    model = nn.Sequential(loaded.to("cpu"))
    finish_loaded(model)
    return linear, model[0]


def with_outliers() -> torch.Tensor:
    x = torch.randn(3, 7, 256, generator=torch.Generator().manual_seed(1))
    x[..., [5, 77]] *= 60  # what the model's own activations look like
    return x


def test_the_product_is_close_although_some_channels_are_huge() -> None:
    linear, quantised = layers()
    x = with_outliers()
    expected, found = linear(x), quantised(x)
    assert found.dtype is x.dtype
    assert ((found - expected).norm() / expected.norm()).item() < 0.01


def test_the_gradient_is_that_of_the_weight() -> None:
    linear, quantised = layers()
    x = with_outliers().requires_grad_()
    expected = torch.autograd.grad(linear(x).square().sum(), x)[0]
    found = torch.autograd.grad(quantised(x).square().sum(), x)[0]
    assert ((found - expected).norm() / expected.norm()).item() < 0.01


def test_no_activation_is_kept_for_backward() -> None:
    _, quantised = layers()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        quantised(with_outliers().requires_grad_())
    assert {tuple(tensor.shape) for tensor in kept} == {(512, 256), (512,)}


@pytest.mark.parametrize("bias", [True, False])
def test_the_shapes_are_those_of_a_loaded_layer(bias: bool) -> None:
    shape = int8_shape(nn.Linear(64, 32, bias=bias, device="meta"))
    assert isinstance(shape, Int8Linear)
    assert shape.weight.dtype is torch.int8
    assert shape.scales.shape == (32,)
    assert (shape.bias is not None) == bias


def test_a_plan_leaves_the_tables_of_bitsandbytes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb.functional, "name2qmap", {})
    config = AutoConfig.for_model("llama", num_hidden_layers=1, hidden_size=64, vocab_size=64)
    shape_base(config, METHODS["qlora"], torch.float32)
    weight = torch.ones(64, 64)
    packed = bnb.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    torch.testing.assert_close(bnb.functional.dequantize_4bit(*packed), weight)


def test_a_weight_takes_a_byte_and_a_row_four_more() -> None:
    config = AutoConfig.for_model(**MODELS["meta-llama/Llama-3.1-8B-Instruct"].text_config)
    model = shape_base(config, METHODS["int8-lora"], torch.bfloat16)
    quantised = [layer for layer in model.modules() if isinstance(layer, Int8Linear)]
    assert len(quantised) == 32 * 7
    in_a_layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    rows_of_a_layer = 2 * 4096 + 2 * 1024 + 2 * 14336 + 4096
    assert sum(layer.weight.nbytes for layer in quantised) == 32 * in_a_layer
    assert sum(layer.scales.nbytes for layer in quantised) == 32 * 4 * rows_of_a_layer
    assert type(model.get_output_embeddings()) is nn.Linear  # type: ignore[operator]
