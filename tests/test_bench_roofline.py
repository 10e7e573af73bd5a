"""Rooflines and published figures: arithmetic against counted models, verdicts, sources."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from test_cli import Type
from test_cli import enter as enter

from strixft.bench.page import compare_cell, open_benchmarks
from strixft.bench.published import (
    FILE,
    Figure,
    choose,
    expect_decode,
    figures,
    first_guide,
    read_figures,
    to_json,
)
from strixft.bench.roofline import (
    BITS,
    SHIPPED,
    WEIGHTS,
    Ceiling,
    Weights,
    compute_ceiling,
    decode_ceiling,
    file_bytes,
    judge,
    read_bytes,
    weights_of,
)
from strixft.catalog.hosts import HOSTS, this_host
from strixft.catalog.models import MODELS
from strixft.model.architecture import multiplied_parameters
from strixft.support.errors import DataError, RecipeError

HEADER = FILE.read_text(encoding="utf-8").partition("\n")[0]


# What is read for a token.


@pytest.mark.parametrize("name", sorted(set(SHIPPED.values())))
def test_parameters_are_those_of_the_model(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = MODELS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape.text_config))
    counted = weights_of(shape.name, shape.text_config, shape.source)
    assert counted.parameters == pytest.approx(model.num_parameters(), rel=1e-3)
    table = model.get_input_embeddings().weight
    looked_up = 0 if model.config.tie_word_embeddings else table.numel()
    assert counted.read_parameters == pytest.approx(model.num_parameters() - looked_up, rel=1e-3)
    multiplied = multiplied_parameters(AutoConfig.for_model(**shape.config))
    assert multiplied == pytest.approx(counted.read_parameters, rel=1e-3)


def test_a_mixture_of_experts_reads_the_experts_that_work() -> None:
    large, small = WEIGHTS["gpt-oss-120b"], WEIGHTS["gpt-oss-20b"]
    assert large.parameters == pytest.approx(116.8e9, rel=0.002)  # arXiv:2508.10925, table 1
    assert large.read_parameters == pytest.approx(5.13e9, rel=0.01)
    assert small.parameters == pytest.approx(20.9e9, rel=0.002)
    assert small.read_parameters == pytest.approx(3.61e9, rel=0.01)
    assert large.sparse
    assert not WEIGHTS["Llama 3.3 70B"].sparse


def test_bits_are_those_of_blocks_and_of_files() -> None:
    assert (BITS["BF16"], BITS["Q8_0"], BITS["Q4_0"], BITS["MXFP4"]) == (16, 8.5, 4.5, 4.25)
    assert BITS["Q4_0"] < BITS["Q4_K_M"] < BITS["Q4_1"]


def test_an_unknown_quantisation_asks_for_the_files_size() -> None:
    with pytest.raises(RecipeError, match="no size is known for Qwen3 8B in 'Q4_K_N'") as caught:
        file_bytes(WEIGHTS["Qwen3 8B"], "Q4_K_N", None)
    assert "did you mean 'Q4_K_M'?" in caught.value.fix
    assert read_bytes(WEIGHTS["Qwen3 8B"], "Q4_K_N", 5.03) < 5.03e9


def test_the_cache_of_a_position_is_keys_and_values_of_every_layer() -> None:
    assert WEIGHTS["Qwen3 8B"].cache_bytes_per_position == 2 * 2 * 36 * 8 * 128


# Ceilings and verdicts.


def test_a_ceiling_is_bandwidth_by_bytes() -> None:
    ceiling = decode_ceiling(HOSTS["strix-halo-128"], 42.5e9)
    assert ceiling is not None
    assert ceiling.tok_per_s == pytest.approx(6.02, abs=0.01)
    assert ceiling.arithmetic(13.5) == ("256 GB/s ÷ 42.5 GB = 6.02 tokens/s; 13.5 needs 573.8 GB/s")


def test_a_host_of_which_nothing_is_known_has_no_ceiling() -> None:
    assert decode_ceiling(this_host(), 1e9) is None
    assert compute_ceiling(this_host(), 1e9, 2) is None


@pytest.mark.parametrize(
    ("rate", "verdict"),
    [(101.0, "impossible"), (100.0, "plausible"), (15.0, "plausible"), (14.9, "too_low")],
)
def test_verdicts_by_the_share_of_the_ceiling(rate: float, verdict: str) -> None:
    ceiling = Ceiling(100, 1e11, 1e9, "GB")
    assert judge(rate, ceiling, fits=True) == verdict
    assert judge(rate, ceiling, fits=False) == "does_not_fit"
    assert judge(None, ceiling) == "does_not_fit"


def test_a_measured_limit_is_no_proof_until_it_is_passed_by_far() -> None:
    ceiling = Ceiling(100, 1e11, 1e9, "GB", theory=False)
    assert judge(140.0, ceiling) == "plausible"
    assert judge(160.0, ceiling) == "impossible"


def test_a_low_rate_of_prompts_is_no_fault() -> None:
    assert judge(1.0, Ceiling(100, 1e14, 1e12, "TFLOP")) == "plausible"


FIRST_GUIDE = {
    ("Qwen3 8B", "v100-32"): ("plausible", 173, 194),
    ("Qwen3 8B", "strix-halo-128"): ("impossible", 49, 55.5),
    ("Qwen3 8B", "dgx-spark"): ("impossible", 52, 59),
    ("Gemma 2 27B", "v100-32"): ("plausible", 57, 58),
    ("Gemma 2 27B", "strix-halo-128"): ("impossible", 16.3, 16.5),
    ("Gemma 2 27B", "dgx-spark"): ("impossible", 17.4, 17.6),
    ("DeepSeek R1 70B", "v100-32"): ("plausible", 42, 43.5),
    ("DeepSeek R1 70B", "strix-halo-128"): ("impossible", 6.0, 6.2),
    ("DeepSeek R1 70B", "dgx-spark"): ("impossible", 6.7, 6.9),
    ("gpt-oss-120b", "v100-32"): ("does_not_fit", 0, 1e9),
    ("gpt-oss-120b", "strix-halo-128"): ("too_low", 78, 93),
    ("gpt-oss-120b", "dgx-spark"): ("too_low", 83, 99),
}
"""Verdict, and the range in which the ceiling has to lie."""


def test_the_twelve_cells_of_the_first_guide() -> None:
    cells = first_guide()
    assert len(cells) == 12
    for cell in cells:
        verdict, least, most = FIRST_GUIDE[cell.model, cell.host]
        assert cell.verdict == verdict, cell
        assert cell.ceiling is not None
        assert least <= cell.ceiling.tok_per_s <= most
    assert Counter(cell.verdict for cell in cells) == {
        "impossible": 6,
        "too_low": 2,
        "plausible": 3,
        "does_not_fit": 1,
    }


def test_no_measured_figure_is_above_its_ceiling() -> None:
    wrong = [row for row in figures() if row.mark == "measured" and row.verdict == "impossible"]
    assert wrong == []


def test_the_vendors_training_rates_need_many_of_their_chips() -> None:
    rows = [row for row in figures() if row.figure == "train_tok_per_s" and row.mark == "vendor"]
    assert len(rows) == 3
    for row in rows:
        assert row.verdict == "impossible"
        assert row.ceiling is not None
        assert row.value is not None
        assert 15 < row.ceiling.share(row.value) < 18


# The table.


def test_every_row_has_a_source_a_mark_and_a_known_model() -> None:
    assert len(figures()) > 90
    for row in figures():
        assert row.source.startswith("https://")
        assert row.mark in ("measured", "vendor", "claimed", "derived")
        assert isinstance(WEIGHTS[row.model], Weights)


def row_with(**changes: str) -> str:
    """A good row of the table, changed."""
    good = {
        "figure": "decode",
        "model": "Qwen3 8B",
        "quantisation": "Q4_K_M",
        "host": "dgx-spark",
        "value": "40",
        "source": "https://example.org",
        "mark": "measured",
    } | changes
    return ",".join(good.get(key, "") for key in HEADER.split(","))


@pytest.mark.parametrize("key", ["source", "mark", "host", "model", "figure"])
def test_a_row_that_lacks_what_counts_is_refused(key: str) -> None:
    with pytest.raises(DataError, match=f"mine.csv, line 3 has no {key}"):
        list(read_figures([HEADER, row_with(), row_with(**{key: ""})], "mine.csv"))


@pytest.mark.parametrize(
    ("key", "word", "says"),
    [
        ("source", "a friend", "line 2: source cannot be 'a friend'\nfix: .*an address, https://"),
        ("mark", "sure", "line 2: mark cannot be 'sure'\nfix: .*'measured', 'vendor'"),
        ("host", "my-box", "line 2: there is no host 'my-box'\nfix: choose one of: strix-halo"),
        (
            "model",
            "Llama 9",
            "line 2: there is no model with known weights 'Llama 9'\nfix: did you",
        ),
        ("value", "fast", "line 2: value cannot be 'fast'\nfix: .*a valid number"),
    ],
)
def test_a_row_with_an_unknown_word_is_refused(key: str, word: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        list(read_figures([HEADER, row_with(**{key: word})]))


def test_a_good_row_is_read() -> None:
    (row,) = read_figures([HEADER, row_with()])
    assert isinstance(row, Figure)
    assert row.verdict == "plausible"


# What is drawn from it.


def test_between_hosts_a_rate_is_drawn_by_the_roofline() -> None:
    expected = expect_decode("Qwen3 8B", "Q4_K_M", "strix-halo-128", 5.03)
    assert expected is not None
    low, median, high = expected
    assert 40 < low < median < high < 51
    assert compare_cell(("Qwen3 8B", "Q4_K_M", 5.03), "strix-halo-128").endswith("[D]")


def test_cells_of_the_comparison() -> None:
    assert compare_cell(("Qwen3 8B", "Q4_K_M", 5.03), "v100-32") == "62.78 [M] (0.32)"
    assert compare_cell(("gpt-oss-120b", "MXFP4", 63.37), "v100-32") == "does not fit: 63.4 GB"
    assert compare_cell(("Llama 3.3 70B", "NVFP4", 40.61), "strix-halo-128") == "–"


def test_the_json_has_a_verdict_for_every_decode_figure() -> None:
    data = to_json(figures())
    assert set(data) == {"rows", "prefill", "training"}
    for row in data["rows"]:
        assert row["verdict"] in ("plausible", "impossible", "too_low", "does_not_fit")
        assert row["ceiling_tok_per_s"] > 0
        assert row["source"]
        assert row["mark"]
    refused: dict[str, Any] = next(row for row in data["rows"] if row["tok_per_s"] is None)
    assert (refused["host"], refused["verdict"]) == ("v100-32", "does_not_fit")


def test_figures_are_chosen_by_host_and_model() -> None:
    assert {row.host for row in choose("dgx-spark", "gpt-oss")} == {"dgx-spark"}
    with pytest.raises(RecipeError, match="there is no host 'spark'"):
        choose("spark")
    with pytest.raises(RecipeError, match="nothing is published here of 'gtp-oss-20b'") as caught:
        choose(model="gtp-oss-20b")
    assert caught.value.fix == "did you mean 'gpt-oss-20b'?"


def test_the_command_prints_one_document(enter: Type) -> None:
    answer = enter("bench", "published", "--host", "v100-32", "--json")
    assert answer.code == 0
    assert {row["host"] for row in json.loads(answer.out)["rows"]} == {"v100-32"}
    shown = enter("bench", "published")
    assert "impossible" in shown.out


def test_the_page_holds_every_source_and_no_markup_of_others() -> None:
    page = open_benchmarks().page()
    for row in figures():
        assert f'href="{row.source}"' in page
    assert "Nothing was measured here yet" in page
    assert page.count("<img") == 2
