"""Evaluation: loss and answers of base and tuned on the held-out rows."""

import math
import tracemalloc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WriteRecipe
from faults.counters import meminfo
from test_train import trained

from strixft.app.report import render_report
from strixft.attention.core import EAGER_NAME
from strixft.data.batches import collate
from strixft.data.end_tokens import Ends
from strixft.data.general import LONGEST, general_rows, general_texts
from strixft.evaluate.generate import generate
from strixft.evaluate.losses import (
    groups_of,
    row_losses,
)
from strixft.evaluate.metrics import METRICS, choose_metrics, paired_change, scores
from strixft.evaluate.stage import check_evaluation, evaluate_recipe
from strixft.evaluate.variants import load_variant
from strixft.guard import stage_watches
from strixft.guard.watch import MemoryWatch
from strixft.model.adapter import load_adapter
from strixft.model.load import load_base
from strixft.model.source import load_tokenizer
from strixft.plan.result import Plan
from strixft.prepare.stage import Prepared, prepare_recipe
from strixft.recipe.load import load_recipe
from strixft.run.folder import Run
from strixft.run.open import open_run
from strixft.step.memory_tracker import MemoryTracker
from strixft.step.update import batch_loss
from strixft.support.errors import DataError, FitError, HostError, RecipeError
from strixft.train.stage import ADAPTER

ENDS = Ends((2,), ("<|im_end|>",))


@pytest.fixture(scope="module")
def shared_run(write_module_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that is trained and not evaluated, for tests that write nothing into it."""
    run = open_run(write_module_recipe(), tmp_path_factory.mktemp("runs") / "run")
    trained(run)
    return run


def test_base_and_tuned_are_measured_on_the_same_rows(tiny_run: Run) -> None:
    trained(tiny_run)
    figures = evaluate_recipe(tiny_run).figures
    loss = figures["metrics"]["loss"]
    assert loss["tuned"] < loss["base"]
    assert figures["metrics"]["perplexity"]["base"] == pytest.approx(math.exp(loss["base"]))
    assert figures["metrics"]["exact_match"].keys() == {"base", "tuned"}
    assert figures["rows_answered"] == len(figures["answers"]) > 0
    assert figures["changes"]["loss"]["change"] == pytest.approx(loss["tuned"] - loss["base"])
    assert figures["changes"]["loss"]["low"] <= figures["changes"]["loss"]["high"]
    assert figures["rows_worse"] >= len(figures["worst"])
    assert all(row["tuned"] > row["base"] for row in figures["worst"])
    assert figures["speed"]["tuned"]["answer_tokens"] > 0
    general = figures["general"]
    assert general["texts"] == len(general_texts())
    assert figures["metrics"]["general_loss"].keys() == {"base", "tuned"}
    assert figures["changes"]["general_loss"]["low"] <= figures["changes"]["general_loss"]["high"]
    assert figures["resident_bytes"] > figures["planned_bytes"] > 0
    assert figures["least_left_bytes"] > 0


def test_full_training_is_evaluated_from_its_own_weights_one_model_at_a_time(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(write_recipe(method="full"), tmp_path / "run")
    trained(run)
    loaded: list[weakref.ref[torch.nn.Module]] = []
    alive: list[int] = []

    def load(*of: Any) -> torch.nn.Module:
        alive.append(sum(model() is not None for model in loaded))
        model = load_base(*of)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr("strixft.evaluate.variants.load_base", load)
    loss = evaluate_recipe(run).figures["metrics"]["loss"]
    assert loss["tuned"] < loss["base"]
    assert alive == [0, 0]


def test_answers_in_a_batch_are_the_answers_alone(shared_run: Run) -> None:
    model = load_base(shared_run.recipe, "cpu", torch.float32).eval()
    tokenizer = load_tokenizer(shared_run.recipe)
    prompts = [tokenizer(text)["input_ids"] for text in ("One.", "A much longer prompt than that.")]
    together = generate(model, tokenizer, ENDS, prompts, 8)
    assert together == [generate(model, tokenizer, ENDS, [prompt], 8)[0] for prompt in prompts]


def test_nothing_held_out_is_an_error(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    run = open_run(write_recipe(dataset={"validation_fraction": 0}), tmp_path / "run")
    trained(run)
    with pytest.raises(DataError, match="no rows are held out") as caught:
        evaluate_recipe(run)
    assert "dataset.validation_fraction" in caught.value.fix


def test_a_paired_interval_sees_what_is_no_chance() -> None:
    base = [1.0, 2.0, 3.0, 4.0] * 5
    better = paired_change(base, [value - 0.5 for value in base])
    assert (better["low"], better["change"], better["high"]) == (-0.5, -0.5, -0.5)
    assert better["clear"]
    chance = paired_change([0.0] * 20, [0.1, -0.1] * 10)
    assert chance["low"] < 0 < chance["high"]
    assert not chance["clear"]


def test_weights_count_in_an_interval() -> None:
    assert paired_change([0, 0], [1, 0], [3, 1])["change"] == 0.75


@pytest.mark.parametrize(
    ("references", "names"),
    [
        (['{"a": 1}', "[2]"], ["exact_match", "json_valid", "json_equal"]),
        (["12", "so it is\n#### 7"], ["exact_match", "number"]),
        (["some words", "12"], ["exact_match"]),
        (["a text of at least eight words in all"] * 2, ["exact_match", "chrf", "rouge_l"]),
    ],
)
def test_metrics_are_guessed_from_the_references(references: list[str], names: list[str]) -> None:
    found, why = choose_metrics("auto", references)
    assert found == names
    assert [line.partition(":")[0] for line in why] == names
    assert all(METRICS[name].because in line for name, line in zip(names, why, strict=True))


def test_a_metric_without_its_library_is_told(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    recipe = load_recipe(write_recipe(evaluate={"metrics": ["loss", "rouge_l"]}))
    with pytest.raises(HostError, match="rouge_l needs a library") as caught:
        check_evaluation(recipe)
    assert caught.value.fix == "pip install 'strixft[eval]'"
    found, why = choose_metrics("auto", ["a text of at least eight words in all"])
    assert found == ["exact_match"]
    assert "left out, it needs pip install" in why[1]


@pytest.mark.parametrize(
    ("name", "answer", "reference", "score"),
    [
        ("exact_match", " a ", "a", 1),
        ("json_valid", "{broken", "{}", 0),
        ("json_valid", '{"b": 1}', "{}", 1),
        ("json_equal", '{"b":1,"a":2}', '{"a": 2, "b": 1}', 1),
        ("json_equal", "word", "word", 0),
        ("number", "it costs 1,200.0 in all", "#### 1200", 1),
        ("number", "nothing", "nothing", 0),
        ("pattern", "id-7 found", "the id-7", 1),
        ("pattern", "id-8", "id-7", 0),
        ("chrf", "the same text", "the same text", 1),
        ("rouge_l", "the cat sat", "the cat ran", pytest.approx(2 / 3)),
    ],
)
def test_scores(name: str, answer: str, reference: str, score: float) -> None:
    assert scores(name, [answer], [reference], r"id-\d") == [score]


def held_out(run: Run) -> list[dict[str, Any]]:
    prepared: Prepared = prepare_recipe(run)
    return list(prepared.token_rows(run.recipe.dataset).validation)


@pytest.mark.parametrize("most_tokens", [1, 150, 10_000])
def test_losses_in_batches_are_the_losses_alone(shared_run: Run, most_tokens: int) -> None:
    rows = held_out(shared_run)
    model = load_base(shared_run.recipe, "cpu", torch.float32).eval()
    alone = []
    for row in rows:
        batch = collate([row])
        with torch.no_grad():
            alone.append(float(batch_loss(model, batch, len(batch["labels"]))))
    assert len({len(row["input_ids"]) for row in rows}) > 1
    assert row_losses(model, rows, most_tokens) == pytest.approx(alone, rel=1e-5)


class Row(dict[str, Any]):
    """A row that is counted as long as it is held."""

    held = most_held = 0

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__(row)
        Row.held += 1
        Row.most_held = max(Row.most_held, Row.held)

    def __del__(self) -> None:
        Row.held -= 1


class OnDisk(Sequence[Row]):
    """Rows that are made when they are asked for."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return Row(self._rows[index])


def test_losses_hold_the_rows_of_one_batch(shared_run: Run) -> None:
    rows = held_out(shared_run) * 20
    model = load_base(shared_run.recipe, "cpu", torch.float32).eval()
    most_tokens = 4 * max(len(row["input_ids"]) for row in rows)
    found = row_losses(model, OnDisk(rows), most_tokens)
    assert Row.most_held <= 20 < len(rows)
    assert found == row_losses(model, rows, most_tokens)


def test_reasoning_before_an_answer_is_not_compared() -> None:
    """A model that reasons writes its own; the reference may have some, or none."""
    answers = ["<think>\nhm\n</think>\n\n4", "hm\n</think>\n\n4", "4"]
    for reference in ("4", "<think>\n2 + 2\n</think>\n\n4"):
        assert scores("exact_match", answers, [reference] * 3, "") == [1, 1, 1]
    assert (
        choose_metrics("auto", ['<think>a</think>{"a": 1}'])[0]
        == choose_metrics("auto", ['{"a": 1}'])[0]
    )


def test_an_interval_of_many_rows_takes_little_memory() -> None:
    values = np.random.default_rng(0).random((2, 50_000))  # drawn 2000 times: 0.8 GB
    base, tuned = values.tolist()
    tracemalloc.start()
    change = paired_change(base, tuned)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 50e6
    assert change["low"] < change["change"] < change["high"]


@pytest.mark.parametrize("rows", [1, 7, 700])  # 700: several parts
def test_an_interval_is_that_of_all_draws_at_once(rows: int) -> None:
    generator = np.random.default_rng(3)
    base, tuned, weights = generator.random(rows), generator.random(rows), np.arange(1.0, rows + 1)
    drawn = np.random.default_rng(5).integers(0, rows, (2000, rows))
    means = ((tuned - base) * weights)[drawn].sum(1) / weights[drawn].sum(1)
    found = paired_change(base.tolist(), tuned.tolist(), weights.tolist(), seed=5)
    assert [found["low"], found["high"]] == np.percentile(means, (2.5, 97.5)).tolist()


def test_a_batch_keeps_within_its_tokens() -> None:
    lengths = [5, 90, 33, 34, 7, 6, 120]
    groups = groups_of(lengths, most_tokens=100)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[index] for index in group)
        assert longest * len(group) <= 100 or len(group) == 1
    assert len(groups) == 4


def test_a_merged_adapter_says_what_the_layers_say(shared_run: Run) -> None:
    rows, folder = held_out(shared_run), shared_run.stage_folder("train") / ADAPTER
    apart = load_adapter(load_base(shared_run.recipe, "cpu", torch.float32), folder).eval()
    merged = load_variant(shared_run.recipe, folder, "tuned")
    losses = row_losses(apart, rows, 500)
    assert row_losses(merged, rows, 500) == pytest.approx(losses, rel=1e-5)
    base = load_variant(shared_run.recipe, folder, "base")
    assert row_losses(base, rows, 500) != pytest.approx(losses, rel=1e-3)


def test_evaluation_holds_what_its_plan_says(shared_run: Run) -> None:
    plan = shared_run.require(Plan).figures
    model: Any = load_base(shared_run.recipe, "cpu", torch.float32).eval()
    tokenizer = load_tokenizer(shared_run.recipe)
    length, rows = plan["choice"]["max_length"], plan["choice"]["evaluated_rows"]
    whole = {"input_ids": [5] * length, "trained": [True] * length}
    works: dict[str, Callable[[], object]] = {
        "evaluate": lambda: row_losses(model, [whole] * rows, rows * length),
        "generate": lambda: generate(
            model, tokenizer, ENDS, [[5] * (length - 4)] * rows, 4, rows * length
        ),
    }
    for phase, work in works.items():
        tracker = MemoryTracker()
        tracker.watch_model(model)
        with torch.no_grad(), tracker:
            work()
        assert tracker.peak_bytes <= plan["phases"][phase]["device_bytes"]
        assert tracker.peak_bytes >= 0.3 * plan["phases"][phase]["device_bytes"]


def test_plain_attention_sees_the_cache(shared_run: Run) -> None:
    model: Any = load_base(shared_run.recipe, "cpu", torch.float32)
    model.eval()
    tokenizer = load_tokenizer(shared_run.recipe)
    prompts = [tokenizer("A prompt of some words.")["input_ids"]]
    usual = generate(model, tokenizer, ENDS, prompts, 8)
    model.set_attn_implementation(EAGER_NAME)
    assert generate(model, tokenizer, ENDS, prompts, 8) == usual


def test_general_texts_are_many_and_of_many_kinds(shared_run: Run) -> None:
    texts = general_texts()
    assert 60 <= len(texts) <= 100
    assert len({text["text"] for text in texts}) == len(texts)
    assert len({text["kind"] for text in texts}) >= 6
    rows = general_rows(load_tokenizer(shared_run.recipe))
    assert all(len(row["input_ids"]) == len(row["trained"]) <= LONGEST for row in rows)
    assert min(sum(row["trained"]) for row in rows) >= 20


def test_prompts_of_ones_own_are_answered_side_by_side(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    (tmp_path / "ask.txt").write_text("Who <are> you?\n\n  Count to three. \n", encoding="utf-8")
    asked = {"prompts": "ask.txt", "prompt_answer_tokens": 5}
    run = open_run(write_recipe(evaluate=asked), tmp_path / "run")
    assert run.recipe.evaluate.prompts == ["Who <are> you?", "Count to three."]
    trained(run)
    evaluated = evaluate_recipe(run)
    prompts = evaluated.figures["prompts"]
    assert [row["prompt"] for row in prompts] == run.recipe.evaluate.prompts
    model = load_base(run.recipe, "cpu", torch.float32).eval()
    tokenizer = load_tokenizer(run.recipe)
    chat = [{"role": "user", "content": "Count to three."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    (answer,) = generate(model, tokenizer, ENDS, [ids], 5)
    assert prompts[1]["base"] == tokenizer.decode(answer, skip_special_tokens=True).strip()
    for page in (evaluated._repr_html_(), render_report(run)):
        assert "your prompt" in page
        assert "Who &lt;are&gt; you?" in page


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"prompts": "nowhere.txt"}, "evaluate.prompts: .*nowhere.txt cannot be read"),
        ({"prompts": ["What?", " "]}, "evaluate.prompts: holds an empty prompt"),
        ({"task_folder": "nowhere"}, "evaluate.task_folder: .*nowhere is not a folder"),
    ],
)
def test_what_is_not_there_is_told_at_once(
    write_recipe: WriteRecipe, asked: dict[str, Any], problem: str
) -> None:
    with pytest.raises(RecipeError, match=problem):
        load_recipe(write_recipe(evaluate=asked))


def test_a_host_that_runs_out_of_memory_ends_the_evaluation(
    shared_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc").mkdir()
    counters, begin = tmp_path / "proc/meminfo", MemoryWatch.require_reserve
    counters.write_text(meminfo(24, 20))

    def then_others_take_it(watch: MemoryWatch) -> None:
        begin(watch)
        counters.write_text(meminfo(24, 0.2))  # of a reserve of 0.5
        assert watch.look() == "stop"

    monkeypatch.setattr(stage_watches, "ROOT", tmp_path)
    monkeypatch.setattr(MemoryWatch, "require_reserve", then_others_take_it)
    with pytest.raises(FitError, match="before the host runs out of memory"):
        evaluate_recipe(shared_run)
    assert not shared_run.is_done("evaluate")
