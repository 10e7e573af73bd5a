"""Packed rows: full, in a fixed order, and no document sees another."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strixft.attention.backends import BACKENDS, cannot
from strixft.attention.interface import use_backend
from strixft.attention.masks import dense_mask, documents_of, packed_rows
from strixft.bench import data
from strixft.data.batches import Batch, PackedRows, PackedShape, collate, length_groups, pack
from strixft.model.architecture import architecture_of


@given(st.lists(st.integers(1, 64), max_size=300), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_every_row_is_packed_once_and_no_packed_row_is_too_long(
    lengths: list[int], seed: int
) -> None:
    packing = pack(lengths, 64, seed)
    assert sorted(packing.rows.tolist()) == list(range(len(lengths)))
    for rows in packing:
        assert 1 <= sum(lengths[row] for row in rows) <= 64


def test_the_same_seed_packs_alike_and_another_one_does_not() -> None:
    rng = random.Random(1)
    lengths = [rng.randrange(10, 500) for _ in range(500)]
    first, again, other = pack(lengths, 512, 7), pack(lengths, 512, 7), pack(lengths, 512, 8)
    assert (first.rows == again.rows).all()
    assert (first.starts == again.starts).all()
    assert not (first.rows == other.rows).all()
    assert len(first) == len(other)


def test_packed_rows_come_in_no_order_of_length() -> None:
    rng = random.Random(2)
    packing = pack([rng.randrange(10, 500) for _ in range(2000)], 512)
    counts = np.diff(packing.starts)
    assert abs(np.corrcoef(counts, np.arange(len(counts)))[0, 1]) < 0.2


@pytest.mark.parametrize("max_length", [2048, 4096])
@pytest.mark.parametrize("rows", [400, 3000])
def test_chats_of_common_lengths_fill_packed_rows(rows: int, max_length: int) -> None:
    rng = random.Random(0)
    lengths = np.array([data.lengths_of_chats(rng, max_length) for _ in range(rows)])
    # the last packed row is filled by chance only: 400 rows of 4096 make just over 30
    assert pack(lengths, max_length).fill(lengths) >= 0.97


def test_nothing_packs_to_nothing() -> None:
    packing = pack([], 64)
    assert len(packing) == 0
    assert packing.fill(np.array([])) == 0


def test_a_row_of_full_length_stands_alone() -> None:
    packing = pack([64, 10, 54, 64], 64)
    assert sorted(sorted(rows.tolist()) for rows in packing) == [[0], [1, 2], [3]]
    assert packing.fill(np.array([64, 10, 54, 64])) == 1.0


# Batches.


def row(*ids: int, trained_from: int = 1) -> dict[str, Any]:
    """A token row whose tokens are trained from a place on."""
    return {"input_ids": list(ids), "trained": [i >= trained_from for i in range(len(ids))]}


def packed(*rows: dict[str, Any]) -> dict[str, Any]:
    """Rows as one packed row."""
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "trained": [flag for row in rows for flag in row["trained"]],
        "lengths": [len(row["input_ids"]) for row in rows],
    }


def test_positions_restart_and_beginnings_are_listed() -> None:
    batch = collate([packed(row(5, 6, 7), row(8, 9)), packed(row(3, 4))])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["cu_seq_lens"].tolist() == [0, 3, 5, 7, 10]
    assert batch["longest"] == 3
    assert batch["num_tokens"] == 7


def test_all_batches_of_a_run_have_one_shape() -> None:
    batch = collate([packed(row(5, 6, 7), row(8, 9))], PackedShape(8, documents=5, longest=6))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]]
    assert batch["cu_seq_lens"].tolist() == [0, 3, 5, 8, 8, 8]
    assert batch["longest"] == 6


def test_a_smaller_last_batch_is_filled_up_with_padding() -> None:
    shape = PackedShape(8, documents=9, longest=5, rows=3)
    batch = collate([packed(row(5, 6, 7), row(8, 9))], shape)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [0] * 8, [0] * 8]
    assert batch["cu_seq_lens"].tolist() == [0, 3, 5, 8, 13, 16, 21, 24, 24, 24]
    assert batch["labels"].tolist() == [6, 7, 9]
    assert batch["num_tokens"] == 5


def documents_in(batch: Batch) -> Tensor:
    return documents_of(batch["cu_seq_lens"], *batch["input_ids"].shape)


def test_no_document_is_trained_to_begin_another() -> None:
    rows = [row(5, 6, 7), row(8, 9), row(3, 4)]
    alone, together = collate(rows), collate([packed(*rows)])
    assert together["labels"].tolist() == alone["labels"].tolist() == [6, 7, 9, 4]
    # each label follows its position in the same document
    places = together["positions"]
    documents = documents_in(together).flatten()
    assert (documents[places] == documents[places + 1]).all()


def test_unpacked_rows_have_neither_positions_nor_documents() -> None:
    assert {"position_ids", "cu_seq_lens"}.isdisjoint(collate([row(1, 2)]))


def test_the_mask_shows_a_token_what_is_before_it_in_its_document() -> None:
    mask = dense_mask(torch.tensor([[0, 0, 0, 1, 2]]))
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert dense_mask(torch.tensor([[0, 0, 0]]), 2)[0, 0].int().tolist() == [
        [1, 0, 0],
        [1, 1, 0],
        [0, 1, 1],
    ]


VARIANTS = {
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
SLIDING = {"sliding_window": 8}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")


def random_family(name: str) -> Any:
    """A small random model of a family, with sliding windows where the family has them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    more = SLIDING if name in ("gemma2", "gemma3_text", "mistral") else {}
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **VARIANTS, **more)).eval()


@pytest.mark.parametrize("backend", ["sdpa-packed", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_states_are_those_of_the_rows_alone(family: str, backend: str) -> None:
    model, way = random_family(family), BACKENDS[backend]
    if model.config.model_type == "gemma2" and backend != "eager":
        assert cannot(way, architecture_of(model.config).heads, "cpu") is not None
        return
    use_backend(model, way)
    rng = random.Random(3)
    rows = [row(*(rng.randrange(5, 400) for _ in range(n))) for n in (17, 40, 3, 25, 31, 60)]
    batch = collate([packed(*rows[:4]), packed(*rows[4:])])
    places = [(0, 0), (0, 17), (0, 57), (0, 60), (1, 0), (1, 31)]
    with torch.no_grad():
        with packed_rows(way, batch) as inputs:
            together = model(input_ids=batch["input_ids"], use_cache=False, **inputs).logits
        for one, (line, start) in zip(rows, places, strict=True):
            alone = model(input_ids=torch.tensor([one["input_ids"]]), use_cache=False).logits[0]
            same = together[line, start : start + len(alone)]
            assert torch.isfinite(same).all()
            assert (same - alone).abs().max() <= 1e-5


def test_another_neighbour_changes_nothing(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    use_backend(model, BACKENDS["sdpa-packed"])

    def logits(*rows: dict[str, Any]) -> torch.Tensor:
        batch = collate([packed(*rows)])
        with torch.no_grad(), packed_rows(BACKENDS["sdpa-packed"], batch) as inputs:
            found: torch.Tensor = model(
                input_ids=batch["input_ids"], use_cache=False, **inputs
            ).logits
        return found[0, 4:]

    mine = row(7, 8, 9, 10)
    assert torch.equal(logits(row(1, 2, 3, 4), mine), logits(row(100, 200, 300, 400), mine))


def test_packed_rows_are_put_together_from_the_rows_on_disk() -> None:
    from datasets import Dataset

    rows = [row(*range(start, start + n)) for start, n in ((10, 5), (20, 3), (30, 8), (40, 2))]
    dataset = Dataset.from_list(rows)
    packing = pack([5, 3, 8, 2], 8)
    found = PackedRows(dataset, packing)
    assert len(found) == len(packing) == 3
    seen = [tuple(ids) for one in found for ids in _documents(one)]
    assert sorted(seen) == sorted(tuple(one["input_ids"]) for one in rows)
    batch = collate([found[0], found[1], found[-1]])
    assert batch["input_ids"].shape == (3, 8)
    assert len(batch["labels"]) == sum(n - 1 for n in (5, 3, 8, 2))
    assert _documents(found[-1]) == _documents(found[2]) == _documents(found.take([0, 2])[1])
    assert list(map(_documents, found.take([2, 0]))) == list(map(_documents, found[::-2]))
    assert found[3:] == found.take([]) == []
    with pytest.raises(IndexError):
        found[3]
    with pytest.raises(IndexError):
        found.take([0, 3])


def _documents(one: dict[str, Any]) -> list[list[int]]:
    ends = np.cumsum(one["lengths"])
    return [part.tolist() for part in np.split(one["input_ids"], ends[:-1])]


# Without packing.


@given(st.lists(st.integers(1, 500), min_size=1, max_size=400), st.integers(1, 16))
@settings(max_examples=50, deadline=None)
def test_groups_of_like_length_hold_every_row_once(lengths: list[int], size: int) -> None:
    assert sorted(length_groups(lengths, size).tolist()) == list(range(len(lengths)))


def test_batches_of_like_length_need_little_padding_and_come_in_no_order() -> None:
    rng = random.Random(4)
    lengths = np.array([data.lengths_of_chats(rng, 2048) for _ in range(4000)])
    batches = lengths[length_groups(lengths, 8, seed=1)].reshape(-1, 8)
    shuffled = lengths[: len(lengths)].reshape(-1, 8)

    def fill(rows: Any) -> float:
        return float(rows.sum() / (rows.max(axis=1) * 8).sum())

    assert fill(batches) > 0.93 > 0.6 > fill(shuffled)
    means = batches.mean(axis=1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2
    same = length_groups(lengths, 8, seed=1).tolist()
    assert same == length_groups(lengths, 8, seed=1).tolist()
    assert same != length_groups(lengths, 8, seed=2).tolist()
