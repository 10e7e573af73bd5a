"""Attention and 4-bit weights are tried before they are used: for real, in a real child."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import WriteRecipe
from torch import Tensor, nn

from strixft.attention.backends import (
    BACKENDS,
    AttentionBackend,
    Heads,
    cannot,
    known_backends,
    known_bad,
)
from strixft.attention.core import attend_eagerly
from strixft.attention.masks import dense_mask, documents_of
from strixft.catalog.methods import METHODS
from strixft.guard.host import find_host
from strixft.model.source import load_config
from strixft.plan.result import plan_figures, plan_recipe
from strixft.prepare.stage import prepare_recipe
from strixft.probe import checks, weights
from strixft.probe import run as probe_run
from strixft.probe.attention import (
    BackendCall,
    Case,
    allowed_error,
    judged,
    largest_error,
    measure_backend,
    reference,
)
from strixft.probe.checks import (
    Verdict,
    choose_attention,
    fastest_blas,
    probe_attention,
    require_device_works,
    usable,
)
from strixft.probe.job import Job
from strixft.probe.run import Task, measure
from strixft.recipe.load import load_recipe
from strixft.run.open import open_run
from strixft.support.child import Probe
from strixft.support.errors import HostError
from strixft.train.stage import train_recipe

HEADS = Heads(
    model_type="llama", head_size=16, query_heads=4, key_heads=2, softcap=None, windowed=False
)
ON_CPU = ("sdpa-packed", "sdpa", "eager", "eager-rows")

BAD_MODULE = '''
"""Attention that goes wrong, each function in its own way."""
import os, time
import torch
from strixft.attention.core import FUNCTIONS, attend_eagerly


def raises(*args, **options):
    raise RuntimeError("invalid device function")


def aborts(*args, **options):
    os.abort()


def hangs(*args, **options):
    time.sleep(600)


def leaks(module, query, key, value, attention_mask, **options):
    seen = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()  # over documents
    return attend_eagerly(module, query, key, value, seen, **options)


def nothing(*args, **options):
    output, _ = attend_eagerly(*args, **options)
    return output * float("nan"), None


def dawdles(*args, **options):
    time.sleep(0.2)
    return attend_eagerly(*args, **options)


for function in (raises, aborts, hangs, leaks, nothing, dawdles):
    FUNCTIONS[function.__name__] = function
'''


def bad_backend(name: str) -> AttentionBackend:
    return replace(
        BACKENDS["sdpa-packed"], name=name, implementation=name, module="bad_backends", why="a test"
    )


@pytest.fixture
def bad_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Six bad backends before the good ones; a child finds the module that registers them."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "bad_backends.py").write_text(BAD_MODULE)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    monkeypatch.setenv("STRIXFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe_run, "STEP_LIMIT_S", 5.0)
    names = ["raises", "aborts", "leaks", "hangs", "nothing", "dawdles"]
    rows = {name: bad_backend(name) for name in names}
    rows |= {name: BACKENDS[name] for name in ON_CPU}
    with mock.patch.dict(BACKENDS, rows, clear=True):
        yield names


def test_bad_backends_are_skipped_with_their_reasons_and_a_run_goes_on(
    bad_backends: list[str],
    write_recipe: WriteRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = open_run(write_recipe(), tmp_path / "run")
    prepare_recipe(run)
    plan = plan_recipe(run)
    assert plan.figures["choice"]["attention"] == "sdpa-packed"
    told = {
        row["value"]: row["source"]
        for row in plan.figures["assumptions"]
        if row["what"] == "attention that is not used"
    }
    assert list(told) == bad_backends
    assert told["raises"] == "probed here: RuntimeError: invalid device function"
    assert told["aborts"].startswith("probed here: crashed (SIGABRT")
    assert told["hangs"] == "probed here: timed out (5 s)"
    assert "of the largest value" in told["leaks"]
    assert told["nothing"] == "probed here: gives values that are not finite numbers"
    assert "ms where sdpa-packed takes" in told["dawdles"]
    children = count_children(monkeypatch)
    assert train_recipe(run).figures["updates"] > 0
    assert children == []


def count_children(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tasks of each child that is started from now on."""
    counted: list[int] = []
    right = probe_run._one_child

    def counting(tasks: list[Task]) -> int:
        counted.append(len(tasks))
        return right(tasks)

    monkeypatch.setattr(probe_run, "_one_child", counting)
    return counted


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another process has it."""
    monkeypatch.setattr(probe_run, "_memo", {})


def test_each_thing_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRIXFT_CACHE", str(tmp_path / "cache"))
    forget(monkeypatch)
    children, host = count_children(monkeypatch), find_host("cpu")
    require_device_works(HEADS, METHODS["qlora"], host)
    assert children == [3]  # two backends and the 4-bit weights, in one child
    verdicts = choose_attention(HEADS, host)
    assert names_of(verdicts) == ["sdpa-packed", "sdpa"]
    assert names_of(choose_attention(HEADS, host, packing=False)) == ["sdpa"]
    assert names_of(choose_attention(HEADS, host, "sdpa")) == ["sdpa"]
    assert children == [3]
    assert names_of(choose_attention(HEADS, host, "eager")) == ["eager"]
    assert names_of(probe_attention(HEADS, host)) == list(ON_CPU)
    assert children == [3, 1, 1]
    forget(monkeypatch)
    assert choose_attention(HEADS, host) == verdicts
    assert children == [3, 1, 1]
    kept = [json.loads(path.read_text()) for path in (tmp_path / "cache/probes").iterdir()]
    assert len(kept) == 5
    for row in kept:
        assert row["depends_on"]["torch"] == torch.__version__
        assert row["depends_on"]["arguments"]["dtype"] == "float32"
        assert row["depends_on"]["device"]


def names_of(verdicts: list[Verdict]) -> list[str]:
    return [backend.name for backend in usable(verdicts)]


def test_another_driver_or_variable_is_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task("nf4", "nf4", {"device": "cpu", "dtype": "float32"})
    before = task.digest()
    assert replace(task, more={"peak": True}).digest() == before
    monkeypatch.setenv("TORCH_BLAS_PREFER_HIPBLASLT", "1")
    assert task.digest() != before


# Verdicts.


def judge(monkeypatch: pytest.MonkeyPatch, figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Verdicts on figures that a child would have given."""
    monkeypatch.setattr(checks, "measure", lambda tasks, fresh: figures)
    return {v.backend.name: v for v in probe_attention(HEADS, replace(GPU, architecture="gfx1151"))}


GPU = replace(find_host("cpu"), device="cuda", bfloat16=True)


def timed(forward_ms: float, error: float = 1e-3) -> dict[str, Any]:
    return {**judged(error, 0.06), "forward_ms": forward_ms, "backward_ms": 2 * forward_ms}


def test_kernels_of_a_package_need_the_package() -> None:
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("it is installed here")
    assert cannot(BACKENDS["varlen-fa4"], HEADS, "cuda") == "flash-attn-4 is not installed"
    assert "varlen-fa4" not in [
        backend.name for backend in known_backends(HEADS, "cuda", "gfx1151")
    ]


def test_no_machine_is_planned_with_kernels_that_were_not_tried_there() -> None:
    with_package = [backend.name for backend in BACKENDS.values() if backend.package]
    assert with_package == ["varlen-fa4"]
    assert known_backends(HEADS, "cuda")[0].name == "varlen"


def test_a_backend_gives_way_to_a_faster_one_that_keeps_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures = {
        "varlen": timed(2.0),
        "flex": timed(1.0),
        "sdpa-packed": timed(1.05),
        "sdpa": timed(0.1),
        "eager": timed(0.01),
    }
    verdicts = judge(monkeypatch, figures)
    assert {name: v.outcome for name, v in verdicts.items()} == {
        "varlen-fa4": "unsupported",
        "varlen": "slower",
        "flex": "right",
        "sdpa-packed": "right",
        "sdpa": "right",
        "eager": "right",
        "eager-rows": "unsupported",
    }
    assert verdicts["varlen"].reason == "takes 6 ms where flex takes 3"
    names = names_of(list(verdicts.values()))
    assert names == ["flex", "sdpa-packed", "sdpa", "eager", "varlen"]


def test_only_a_measurement_overrules_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    gemma = replace(HEADS, model_type="gemma3_text")
    assert known_bad(BACKENDS["varlen"], gemma, "gfx1151") is not None
    assert [backend.name for backend in known_backends(gemma, "cuda", "gfx1151")] == [
        "flex",
        "eager",
        "eager-rows",
    ]
    host = replace(GPU, architecture="gfx1151")
    figures = {name: timed(1.0) for name in BACKENDS} | {"sdpa": timed(1.0, float("inf"))}
    monkeypatch.setattr(checks, "measure", lambda tasks, fresh: figures)
    verdicts = {v.backend.name: v for v in probe_attention(gemma, host)}
    assert verdicts["varlen"].outcome == "right"
    assert verdicts["varlen"].reason == (
        "right here, though reported: loss NaN from the first step in Gemma 3"
        " (unslothai/unsloth#3385, PR #3588)"
    )
    assert verdicts["sdpa"].outcome == "wrong"
    assert "sdpa" not in names_of(list(verdicts.values()))


def test_what_keeps_scores_is_tried_where_nothing_else_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[list[str]] = []

    def figures(tasks: list[Task], fresh: bool = False) -> dict[str, Any]:
        tried.append([task.name for task in tasks])
        wrong = timed(1.0, float("inf"))
        return {t.name: timed(1.0) if t.name.startswith("eager") else wrong for t in tasks}

    monkeypatch.setattr(checks, "measure", figures)
    assert names_of(choose_attention(HEADS, find_host("cpu"))) == ["eager", "eager-rows"]
    assert tried == [["sdpa-packed", "sdpa"], list(ON_CPU)]


def test_no_backend_that_is_right_is_an_error(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashed = {"problem": "crashed (SIGSEGV)", "ended": "crashed"}
    monkeypatch.setattr(
        checks, "measure", lambda tasks, fresh=False: {task.name: crashed for task in tasks}
    )
    with pytest.raises(HostError, match="no attention backend is right on") as caught:
        choose_attention(HEADS, find_host("cpu"))
    assert "(sdpa-packed: crashed (SIGSEGV); sdpa: crashed (SIGSEGV); eager" in caught.value.problem
    assert caught.value.fix.startswith("strixft doctor   says what is wrong; strixft bench")
    recipe = load_recipe(write_recipe())
    with pytest.raises(HostError, match="attention 'sdpa', which the plan chose") as caught:
        Job.planned(
            recipe,
            load_config(recipe),
            find_host("cpu"),
            {"attention": "sdpa"},
            "strixft run x --from plan",
        )
    assert caught.value.problem.endswith(": crashed (SIGSEGV)")
    assert caught.value.fix == "strixft run x --from plan"


@pytest.mark.parametrize(
    ("how", "figures"),
    [
        ("SIGKILL", None),
        ("180 s", None),
        ("", {"problem": "out of memory", "out_of_memory": True}),
    ],
)
def test_what_may_go_otherwise_next_time_is_not_kept(
    how: str, figures: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRIXFT_CACHE", str(tmp_path / "cache"))
    forget(monkeypatch)
    probe = (
        Probe(ended="timed out" if how == "180 s" else "crashed", at="nf4", how=how)
        if figures is None
        else Probe(ended="done", steps={"nf4": figures})
    )
    monkeypatch.setattr(probe_run, "run_steps", lambda *_, **__: probe)
    task = Task("nf4", "nf4", {"device": "cpu", "dtype": "float32"})
    assert "problem" in measure([task])["nf4"]
    assert not (tmp_path / "cache").exists()


# The work itself.


def test_the_reference_is_attention_of_each_document_alone() -> None:
    case = Case.random(HEADS, "cpu", torch.float64)
    result, start = reference(case)[0], 0
    for length in case.lengths:
        place = slice(start, start + length)
        q, k, v = (tensor[place].transpose(0, 1) for tensor in (case.query, case.key, case.value))
        due = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        assert torch.allclose(result[place].transpose(0, 1), due, atol=1e-12)
        start += length
    assert start == 192


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
def test_gradients_of_the_reference_are_those_of_the_whole_mask(
    softcap: float | None, windowed: bool, sinks: bool
) -> None:
    heads = replace(HEADS, softcap=softcap, sinks=sinks)
    case = Case.random(heads, "cpu", torch.float64, windowed=windowed)
    found = BackendCall(BACKENDS["eager"], case, "cpu").results()
    assert largest_error(found, reference(case)) < 1e-6  # its softmax is in float32


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backends_that_are_right_stay_far_below_what_is_allowed(backend: str, dtype: str) -> None:
    heads = asdict(replace(HEADS, windowed=True))
    figures = measure_backend(asdict(BACKENDS[backend]), heads, "cpu", dtype, peak=True)
    assert "problem" not in figures
    assert 0 < figures["error"] < 0.5 * figures["allowed_error"]
    assert figures["peak_bytes"] > 0


@pytest.mark.parametrize("windowed", [False, True])
def test_flash_attention_is_told_where_documents_end(
    windowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel has no CPU; what it is given is computed plainly in its place."""
    case = Case.random(HEADS, "cpu", torch.float32, windowed=windowed)

    def plainly(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, *sizes: Any) -> Tensor:
        longest, _, window, sinks = sizes
        assert (longest, window, sinks) == (41, 8 if windowed else None, None)
        mask = dense_mask(documents_of(ends, 2, 96), window)
        return attend_eagerly(nn.Module(), query, key, value, mask)[0]

    monkeypatch.setattr("strixft.attention.core.varlen", plainly)
    found = BackendCall(BACKENDS["varlen"], case, "cpu").results()
    assert largest_error(found, reference(case)) < 1e-5


def test_a_mask_that_lets_a_first_token_look_ahead_is_wrong() -> None:
    case = Case.random(HEADS, "cpu", torch.bfloat16)
    call = BackendCall(BACKENDS["sdpa-packed"], case, "cpu")
    mask: Tensor = call._options["attention_mask"]
    mask[0, 0, 41, 42] = True  # one of 18,432 places
    error = largest_error(call.results(), reference(case))
    assert "wrong by" in judged(error, allowed_error(torch.bfloat16, 41))["problem"]


# 4-bit weights.


def test_the_code_book_is_bitsandbytes_own() -> None:
    from bitsandbytes.functional import get_4bit_type

    assert get_4bit_type("nf4", "cpu").tolist() == pytest.approx(weights.CODES, abs=1e-7)


def test_blocks_that_are_exchanged_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import functional

    right = functional.dequantize_4bit

    def exchanged(packed: Tensor, state: object) -> Tensor:
        found: Tensor = right(packed, state)
        found[0, :2] = found[0, :2].flip(0)  # 2 of 262,144 values are not enough
        found[:8] *= 1.1  # 4,096 are, zeros aside
        return found

    monkeypatch.setattr(functional, "dequantize_4bit", exchanged)
    assert "0.9% of them are not" in weights.round_trip("cpu", "float32")["problem"]


def test_wrong_4_bit_weights_are_an_error_that_says_what_to_type(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_recipe(method="qlora"))
    monkeypatch.setattr(
        "strixft.probe.checks.measure",
        lambda tasks, fresh=False: {
            "nf4": {"problem": "error 1.41 of the values' length, 0.12 is due"}
        },
    )
    with pytest.raises(HostError, match="4-bit weights are wrong on cpu") as caught:
        plan_figures(recipe)
    assert "error 1.41 of the values' length" in caught.value.problem
    assert caught.value.fix.startswith('pip install "bitsandbytes>=0.50,<0.51"   and start')
    assert caught.value.fix.endswith("until then: --set method=lora")
    assert plan_figures(recipe, "strix-halo-128")["choice"]["attention"] == "varlen"


def test_the_faster_library_is_taken_where_the_base_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures = {"ms": {"cublas": 3.4, "cublaslt": 8.4}, "fastest": "cublas"}
    monkeypatch.setattr("strixft.probe.checks.measure", lambda tasks: {tasks[0].name: figures})
    assert fastest_blas(METHODS["full"], GPU) == "cublas"
    assert fastest_blas(METHODS["lora"], GPU) is None
    assert fastest_blas(METHODS["full"], find_host("cpu")) is None
    figures["problem"] = "wrong by 0.5"
    assert fastest_blas(METHODS["full"], GPU) is None


def test_the_layout_of_weight_gradients_is_right_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SIZE", 128)
    figures = weights.measure_products("cpu", "float32")
    assert "problem" not in figures
    assert set(figures["ms"]) <= set(weights.LIBRARIES)
    assert figures["fastest"] in figures["ms"]
