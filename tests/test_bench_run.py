"""The bench measures what it says, with rows that fit side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteRecipe
from test_cli import Type
from test_cli import enter as enter

from strixft.attention.backends import BACKENDS
from strixft.bench import data, kernels, timing
from strixft.bench.run import (
    BENCHES,
    Bench,
    Measured,
    append,
    read_store,
    run_bench,
    store_file,
)
from strixft.catalog.models import MODELS
from strixft.guard import sensors
from strixft.guard.host import find_host
from strixft.support.errors import FitError, HostError, RecipeError, StageError, StrixftError


def test_an_unknown_bench_is_told_with_the_known_ones() -> None:
    with pytest.raises(StrixftError, match="there is no bench 'date'") as caught:
        run_bench("date")
    assert caught.value.fix == "did you mean 'data'?"


def test_both_preparations_train_the_same_answers(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_bench("data", rows=40, repeat=1).rows
    assert capsys.readouterr().out == ""
    assert [(row["set"], row["preparation"].split(",")[0]) for row in rows] == [
        ("english", "strixft"),
        ("english", "TRL"),
        ("english", "TRL"),
        ("numbered", "strixft"),
        ("numbered", "TRL"),
        ("numbered", "TRL"),
        ("mixed lengths", "strixft"),
    ]
    for ours, theirs in ((rows[0], rows[1]), (rows[3], rows[4])):
        assert ours["chats"] == theirs["chats"] == 40
        # the held-out rows are not among ours
        assert 0.8 < ours["trained_tokens"] / theirs["trained_tokens"] <= 1
        assert ours["chats_per_s"] > 0
        assert ours["cpu_ms_per_chat"] > 0


def test_without_trl_its_rows_are_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(HostError, match=r"TRL, .* is not installed") as caught:
        run_bench("data", rows=40)
    assert caught.value.fix == "pip install 'strixft[dev]'; or --no-peer"
    rows = run_bench("data", rows=40, repeat=1, peer=False).rows
    assert [row["preparation"] for row in rows] == ["strixft"] * 3


@pytest.mark.parametrize("kind", data.SETS)
def test_chats_are_the_same_each_time_and_have_about_300_tokens(kind: str, tmp_path: Path) -> None:
    tokenizer = data.embedded_tokenizer()
    path, again = (data.write_chats(tmp_path / name, 200, kind, tokenizer) for name in "ab")
    assert path.read_bytes() == again.read_bytes()
    texts = [
        tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        for line in path.read_text().splitlines()
    ]
    tokens = sum(len(ids) for ids in tokenizer(texts)["input_ids"]) / 200
    assert 280 < tokens < 360


# Timing.


def test_a_rate_has_a_median_a_spread_and_a_difference_turn_by_turn() -> None:
    assert timing.columns("x", [1.0, 4.0, 2.0]) == {"x": 2.0, "spread": 1.5, "repeats": 3}
    order: list[str] = []

    def measure(name: str, *seconds: float) -> Callable[[], float]:
        left = iter(seconds)

        def turn() -> float:
            order.append(name)
            return next(left)

        return turn

    ours, direct = measure("ours", 1.0, 4.0, 2.0), measure("direct", 1.0, 8.0, 2.0)
    found = timing.rate_columns("per_s", 8.0, 3, ours, direct)
    assert list(found) == ["per_s", "spread", "repeats", "direct_per_s", "off"]
    assert list(found.values()) == [4.0, 1.5, 3, 4.0, 0.0]
    assert order == ["ours", "direct"] * 3


def test_short_work_is_repeated() -> None:
    calls: list[int] = []
    timing.work_columns("per_s", 1.0, 2, lambda: calls.append(1), "cpu", check=True)
    assert len(calls) == 3 + 2 * 2 * timing.MOST_CALLS


def test_sensors_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    device = tmp_path / "sys/class/drm/card0/device"
    (device / "hwmon/hwmon3").mkdir(parents=True)
    (device / "vendor").write_text("0x1002")
    (device / "hwmon/hwmon3/freq1_input").write_text("2900000000")
    (device / "hwmon/hwmon3/power1_average").write_text("85000000")
    assert sensors.read_sensors("cuda", tmp_path) == {"clock_mhz": 2900, "power_w": 85}
    with timing.watched(lambda: sensors.read_sensors("cuda", tmp_path)) as seen:
        pass
    assert seen == {"clock_mhz": 2900, "power_w": 85}


# Matrix products and bandwidth.


@pytest.fixture
def small_layers(monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of small layers, and short turns."""
    config = dict(MODELS["Qwen/Qwen3-4B"].text_config) | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "vocab_size": 128,
        "head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    small = replace(MODELS["Qwen/Qwen3-4B"], name="small", config=config)
    monkeypatch.setitem(kernels.SQUARES, "cpu", (64,))
    monkeypatch.setitem(MODELS, "small", small)
    monkeypatch.setattr(timing, "LEAST_TURN_S", 0.001)
    return "small"


def test_layers_of_a_model_stand_once_each() -> None:
    assert kernels.layer_shapes("meta-llama/Llama-3.1-8B-Instruct", 512) == {
        "q_proj": (512, 4096, 4096),
        "k_proj": (512, 4096, 1024),
        "up_proj": (512, 4096, 14336),
        "down_proj": (512, 14336, 4096),
        "lm_head": (512, 4096, 128256),
    }


@pytest.mark.parametrize("layout", kernels.LAYOUTS)
def test_a_layout_multiplies_as_autograd_does(layout: str) -> None:
    import torch

    shape = (3, 4, 5)
    left, right = kernels.operands(shape, layout, "cpu", torch.float64)
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    y = torch.nn.functional.linear(x, weight)
    y.sum().backward()
    result = {"forward": y, "input gradient": x.grad, "weight gradient": weight.grad}[layout]
    assert result is not None
    assert (left @ right).shape == result.shape
    contiguous = {"forward": (True, False), "input gradient": (True, True)}
    expected = contiguous.get(layout, (False, True))
    assert (left.is_contiguous(), right.is_contiguous()) == expected


def test_products_are_measured_in_every_layout_beside_torch_alone(small_layers: str) -> None:
    result = run_bench("gemm", model=small_layers, tokens=16, repeat=2, check=True)
    assert len(result.rows) == 3 * 6
    for row in result.rows:
        assert row["tflop_per_s"] > 0
        assert row["direct_tflop_per_s"] > 0
        assert row["share_of_peak"] is None
    assert {row["layout"] for row in result.rows} == set(kernels.LAYOUTS)


def test_a_dtype_that_is_not_measured_is_refused() -> None:
    with pytest.raises(RecipeError, match="not measured in 'int8'") as caught:
        run_bench("gemm", dtypes="float32,int8")
    assert caught.value.fix == "--dtypes bfloat16,float16,float32"


def test_bandwidth_counts_what_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LEAST_TURN_S", 0.01)
    result = run_bench("bandwidth", size_gib=0.01, repeat=2)
    by_work = {row["work"]: row["gb_per_s"] for row in result.rows}
    assert list(by_work) == ["copy", "read", "write", "matrix × vector"]
    assert all(0.1 < rate < 10_000 for rate in by_work.values())


def test_buffers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FitError, match="do not fit"):
        run_bench("bandwidth", size_gib=1e6)


def test_measured_rates_become_the_hosts(small_layers: str) -> None:
    bandwidth = run_bench("bandwidth", size_gib=0.01, repeat=1, host_row=True)
    products = run_bench("gemm", model=small_layers, tokens=16, repeat=1, host_row=True)
    host = find_host("auto")
    assert host.bandwidth_bytes_per_s is not None
    assert host.bandwidth_bytes_per_s.value == pytest.approx(bandwidth.rows[0]["gb_per_s"] * 1e9)
    assert host.bandwidth_bytes_per_s.source.startswith("strixft bench bandwidth, 20")
    rate = host.matmul_flop_per_s["float32"]
    assert rate.value == pytest.approx(products.rows[0]["tflop_per_s"] * 1e12)
    assert rate.mark == "measured"


# A model in this process.


def test_a_model_is_decoded_from_an_empty_cache_and_behind_a_prompt(tiny_model: Path) -> None:
    run_bench("bandwidth", size_gib=0.01, repeat=1, host_row=True)
    result = run_bench("decode", model=str(tiny_model), new_tokens=16, depth=64, repeat=2)
    first, behind = result.rows
    assert [row["test"] for row in result.rows] == ["tg16", "tg16@d64"]
    assert (first["prompt_tokens"], behind["prompt_tokens"]) == (4, 64)
    assert (first["variant"], first["clock"], first["tokens"]) == ("base", "client", 16)
    assert first["total_s"] == pytest.approx(first["first_token_s"] + first["decode_s"], rel=0.5)
    assert behind["gb_per_token"] > first["gb_per_token"]
    assert first["share"] == pytest.approx(first["tok_per_s"] / first["ceiling_tok_per_s"])
    assert len(result.details()) == 3


def test_prompts_of_several_lengths_are_read(tiny_model: Path) -> None:
    rows = run_bench("prefill", model=str(tiny_model), prompt_tokens="64,128", repeat=3).rows
    assert [(row["test"], row["prompt_tokens"]) for row in rows] == [("pp64", 64), ("pp128", 128)]
    for row in rows:
        spent = row["prompt_tokens"] / row["tok_per_s"]  # of the middle one of three, as below
        assert row["first_token_s"] == pytest.approx(spent, rel=1e-6)


def test_the_harness_and_a_bare_loop_make_the_same_tokens(tiny_model: Path) -> None:
    import torch

    from strixft.bench.in_process import decode, load_model, read_prompt

    (loaded,) = load_model(str(tiny_model), "lora")
    ids = loaded.prompt(12, 1)
    with torch.no_grad():
        token, cache = read_prompt(loaded.model, ids)
        last = decode(loaded.model, token, cache, 7)
    made = loaded.model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert made[0, 12].item() == token.item()
    assert made[0, -1].item() == last.item()


def test_the_check_times_both_loops(tiny_model: Path) -> None:
    (row,) = run_bench("decode", model=str(tiny_model), new_tokens=16, repeat=2, check=True).rows
    assert row["direct_tok_per_s"] > 0
    assert -0.9 < row["off"] < 9


def test_a_run_is_measured_as_base_with_its_adapter_and_merged(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    from strixft import open_run, plan_recipe, prepare_recipe, train_recipe

    run = open_run(write_recipe(), tmp_path / "runs/tiny")
    with pytest.raises(StageError, match="has no adapter") as caught:
        run_bench("decode", run=str(run.folder))
    assert caught.value.fix == f"{run.resume_command} --to train, or --model with a folder"
    prepare_recipe(run)
    plan_recipe(run)
    train_recipe(run)
    rows = run_bench("decode", run=str(run.folder), new_tokens=16, depth=0, repeat=1).rows
    assert [row["variant"] for row in rows] == ["base", "adapter", "merged"]
    base, adapter, merged = (row["gb_per_token"] for row in rows)
    assert base == merged < adapter


def test_only_one_thing_is_measured_at_once() -> None:
    with pytest.raises(RecipeError, match="server and run cannot be measured at once"):
        run_bench("decode", server="localhost:1", run="x")


# The store.


def measured(**changes: Any) -> Measured:
    """A result."""
    data: dict[str, Any] = {
        "bench": "bandwidth",
        "started": "2026-11-25T00:00:00+00:00",
        "seconds": 1.0,
        "host": {"device": "x"},
        "versions": {},
        "settings": {},
        "conditions": {"power_w": 85.0},
        "rows": [{"work": "copy", "gb_per_s": 200.0}],
    }
    return Measured(**(data | changes))


def test_a_wide_table_is_shown_on_its_side() -> None:
    wide = [{"model": name, **{f"figure_{n}": n for n in range(12)}} for name in "ab"]
    rows, header = measured(rows=wide).table()
    assert header == ["model", "a", "b"]
    assert rows[-1] == ["figure_11", "11", "11"]
    assert measured().table() == ([["copy", "200"]], ["work", "gb_per_s"])


def test_results_are_appended_and_read_again() -> None:
    first = run_bench("bandwidth", size_gib=0.001, repeat=1)
    run_bench("bandwidth", size_gib=0.001, repeat=1, save=False)
    append(measured())
    stored = read_store()
    assert stored.left_out == []
    assert stored.results == [first, measured()]
    assert set(first.settings) == {"size_gib", "repeat", "check"}
    assert "torch" in first.versions


def test_lines_of_another_version_are_kept_and_named() -> None:
    append(measured())
    with store_file().open("a") as file:
        file.write(json.dumps({**measured().model_dump(), "format": 9}) + "\n[1]\n")
    append(measured(seconds=2.0))
    stored = read_store()
    assert [result.seconds for result in stored.results] == [1.0, 2.0]
    assert [text.partition(", ")[2].partition(":")[0] for text in stored.left_out] == [
        "line 2",
        "line 3",
    ]
    assert "format: Input should be 1" in stored.left_out[0]
    assert len(store_file().read_text().splitlines()) == 4


def test_a_line_that_was_cut_off_does_not_spoil_the_next() -> None:
    append(measured())
    text = store_file().read_text()
    store_file().write_text(text + text[:40])
    append(measured(seconds=3.0))
    stored = read_store()
    assert [result.seconds for result in stored.results] == [1.0, 3.0]
    assert len(stored.left_out) == 1


# The command line.


@pytest.mark.parametrize("name", BENCHES)
def test_every_option_of_a_bench_has_a_default_and_a_help(name: str) -> None:
    bench = BENCHES[name].load()
    assert bench.__doc__ != Bench.__doc__
    assert set(bench.model_fields) > set(Bench.model_fields)
    for field in bench.model_fields.values():
        assert field.description
        assert type(field.default) is field.annotation


def test_an_option_that_is_misspelt_names_the_near_one() -> None:
    with pytest.raises(RecipeError, match="no option 'repaet'") as caught:
        run_bench("bandwidth", repaet=1)
    assert caught.value.fix == "did you mean 'repeat'?"


def test_the_command_prints_one_document_and_keeps_the_rates(enter: Type) -> None:
    words = ("bench", "bandwidth", "--size-gib", "0.01", "--repeat", "1", "--host-row", "--json")
    answer = enter(*words)
    assert answer.code == 0
    data = json.loads(answer.out)
    assert data["bench"] == "bandwidth"
    assert data["settings"]["size_gib"] == 0.01
    assert "rates for planning: " in answer.err
    assert find_host("auto").bandwidth_bytes_per_s is not None


def test_the_help_names_every_bench_without_torch(enter: Type) -> None:
    shown = enter("bench", "--help").out
    for name in (*BENCHES, "published"):
        assert f"  {name} " in shown
    assert "--host-row" in enter("bench", "gemm", "--help").out
    assert "--host-row" not in enter("bench", "decode", "--help").out


def test_a_bench_that_is_misspelt_exits_with_2(enter: Type) -> None:
    answer = enter("bench", "gem")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == "there is no bench 'gem'\nfix: did you mean 'gemm'?\n"


@pytest.mark.parametrize("words", [("--repeat", "0"), ("--size-gib", "-1")])
def test_a_number_that_is_too_small_is_refused(enter: Type, words: tuple[str, str]) -> None:
    answer = enter("bench", "bandwidth", *words)
    assert answer.code == 2
    problem, fix = answer.err.splitlines()
    least = {"--repeat": 1, "--size-gib": 0}[words[0]]
    assert problem.startswith(f"{words[0]} {words[1]}")
    assert problem.endswith(f": input should be greater than or equal to {least}")
    assert fix == f"fix: {words[0]} {least}"


def test_a_value_of_another_type_is_refused() -> None:
    with pytest.raises(RecipeError, match="--repeat often: input should be a valid integer"):
        run_bench("bandwidth", repeat="often")


def test_a_store_that_cannot_be_written_is_told_before_measuring(enter: Type) -> None:
    store_file().parent.parent.mkdir(exist_ok=True)
    store_file().parent.write_text("in the way")
    answer = enter("bench", "bandwidth")
    assert answer.code == 1
    assert f"{store_file()} cannot be written" in answer.err
    assert "--no-save" in answer.err
    assert enter("bench", "bandwidth", "--size-gib", "0.001", "--no-save").code == 0


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(
    tmp_path: Path, tiny_model: Path
) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    config = json.loads((tiny_model / "config.json").read_text())
    config |= {"num_hidden_layers": 900, "hidden_size": 8192, "intermediate_size": 65536}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FitError, match=r"needs \d+\.\d+ GiB for its weights") as caught:
        run_bench("decode", model=str(folder))
    assert caught.value.fix.startswith("--method qlora")


def test_attention_is_tried_anew_and_every_way_has_a_verdict(tiny_model: Path) -> None:
    result = run_bench("attention", model=str(tiny_model))
    rows = {row["attention"]: row for row in result.rows}
    assert list(rows) == list(BACKENDS)
    assert {row["heads"] for row in result.rows} == {"4/2×16"}
    for name, row in rows.items():
        if "cpu" in BACKENDS[name].devices:
            assert row["verdict"] == "right"
            assert 0 < row["error"] < row["allowed_error"]
            assert row["peak_mib"] > 0
        else:
            assert (row["verdict"], row["reason"]) == ("unsupported", "no gradients on cpu")
    assert read_store().results[-1].bench == "attention"


def test_neighbours_of_a_choice_fit_and_are_others() -> None:
    from strixft.bench.train import Trial, bench_job
    from strixft.catalog.hosts import HOSTS, Budget

    model, host = "meta-llama/Llama-3.2-1B-Instruct", HOSTS["h200-141"]
    job = bench_job(model, "qlora", 512, host, tokens_per_update=4096, compile="none")
    limit = Budget(4 * 10**9, "--budget-gb")
    bench = Trial(job, limit, updates=1)
    runs = bench.plans(4)
    assert len({(run.shape.rows, run.recomputed_layers) for run in runs}) == len(runs) == 5
    assert max(run.reserved_bytes for run in runs) <= limit.num_bytes
    rates = [bench.planned_tok_per_s(run) or 0 for run in runs]
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert max(rates) <= rates[0] * 1.01
    assert bench.plans(0) == runs[:1]
