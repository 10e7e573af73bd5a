"""Room beside frozen weights: who gets it, and that nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from strixft.model import build
from strixft.recipe import Dataset, Lora, Recipe
from strixft.step import decoder_layers
from strixft.step.room import ALIGNED, give_room, room_of

RANK = 5


def a_model(folder: Path, method: str) -> Any:
    recipe = Recipe(
        model=str(folder), method=method, lora=Lora(r=RANK), dataset=Dataset(source="none")
    )
    return build(recipe, "cpu", torch.float32)


def frozen_weights(model: nn.Module) -> list[torch.Tensor]:
    layers: Any = decoder_layers(model).modules()
    return [module.base_layer.weight for module in layers if isinstance(module, LoraLayer)]


def test_frozen_weights_get_room_for_three_adapters(tiny_model: Path) -> None:
    model = a_model(tiny_model, "lora")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    weights = frozen_weights(model)
    give_room(model)
    assert len(weights) == 7 * len(decoder_layers(model))
    for weight in weights:
        assert room_of(weight) == room_of(weight.T) >= 3 * RANK
        assert weight.stride(0) % ALIGNED == 0
        rows, columns = weight.shape
        enough = (rows + 3 * RANK) * (columns + 3 * RANK) * weight.element_size()
        assert weight.untyped_storage().nbytes() >= enough
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.is_contiguous() != any(weight is one for one in weights)


def test_who_has_room_stays_where_it_is(tiny_model: Path) -> None:
    model = a_model(tiny_model, "lora")
    give_room(model)
    places = [weight.data_ptr() for weight in model.parameters()]
    give_room(model)
    assert [weight.data_ptr() for weight in model.parameters()] == places


@pytest.mark.parametrize("method", ["full", "qlora", "int8-lora"])
def test_what_is_trained_or_quantised_stays_where_it_is(method: str, tiny_model: Path) -> None:
    if method != "full":
        pytest.importorskip("bitsandbytes")
    model = a_model(tiny_model, method)
    places = [weight.data_ptr() for weight in model.parameters()]
    give_room(model)
    assert [weight.data_ptr() for weight in model.parameters()] == places
