"""Room beside frozen weights: who gets it, and that nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from strixft.model.adapter import decoder_layers
from strixft.model.load import build
from strixft.recipe.schema import Dataset, Lora, Recipe
from strixft.step.room import ALIGNED, ROOM, add_room, give_room, room_of

RANK = 5


def a_model(folder: Path, method: str, rank: int = RANK) -> Any:
    recipe = Recipe(
        model=str(folder), method=method, lora=Lora(r=rank), dataset=Dataset(source="none")
    )
    return build(recipe, "cpu", torch.float32)


def places_of(model: Any) -> list[int]:
    return [weight.data_ptr() for weight in model.parameters()]


def frozen_weights(model: nn.Module) -> list[torch.Tensor]:
    layers: Any = decoder_layers(model).modules()
    return [module.base_layer.weight for module in layers if isinstance(module, LoraLayer)]


def test_frozen_weights_get_room_for_adapters(tiny_model: Path) -> None:
    model = a_model(tiny_model, "lora")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    weights = frozen_weights(model)
    give_room(model)
    assert len(weights) == 7 * len(decoder_layers(model))
    for weight in weights:
        assert room_of(weight) == room_of(weight.T) >= ROOM
        assert weight.stride(0) % ALIGNED == 0
        rows, columns = weight.shape
        enough = (rows + ROOM) * (columns + ROOM) * weight.element_size()
        assert weight.untyped_storage().nbytes() >= enough
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.is_contiguous() != any(weight is one for one in weights)


def test_who_has_room_stays_where_it_is(tiny_model: Path) -> None:
    model = a_model(tiny_model, "lora")
    give_room(model)
    places = places_of(model)
    give_room(model)
    assert places_of(model) == places


def test_what_lies_beside_a_weight_is_not_taken_for_room() -> None:
    large = torch.zeros(100 + ROOM, 128 + ROOM)
    for weight in (large[:, :128], large[:100, ROOM:], large[:100, :100]):
        add_room(weight)
        assert weight.untyped_storage().data_ptr() != large.untyped_storage().data_ptr()
        assert room_of(weight) >= ROOM
    whole = large[:100, :128]  # this is how it is made
    add_room(whole)
    assert whole.untyped_storage().data_ptr() == large.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("method", "rank"), [("full", 5), ("qlora", 5), ("int8-lora", 5), ("dora", 5), ("lora", 65)]
)
def test_who_cannot_use_room_stays_where_it_is(method: str, rank: int, tiny_model: Path) -> None:
    if method in ("qlora", "int8-lora"):
        pytest.importorskip("bitsandbytes")
    model = a_model(tiny_model, method, rank)
    places = places_of(model)
    give_room(model)
    assert places_of(model) == places
