"""A judge: a real llama.cpp server, and servers that fail in every way that one can."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import EMBEDDED, WriteRecipe
from http_server import Raw, serving
from test_train import trained

from strixft.app.compare import Comparison
from strixft.app.report import render_report
from strixft.evaluate.judge import Judged, judge_answers, messages_for, read_verdict, sum_up
from strixft.evaluate.stage import evaluate_recipe
from strixft.model.files import embedded_file
from strixft.recipe.load import load_recipe
from strixft.recipe.schema import Recipe
from strixft.recipe.servers import Judge
from strixft.run.folder import Run
from strixft.run.open import open_run
from strixft.servers.client import find_object
from strixft.servers.llama_cpp import served
from strixft.support.files import write_json

CHAT = "/v1/chat/completions"
MODELS = {"/v1/models": lambda _: {"data": [{"id": "m", "recipe": "flm"}]}}
ANSWERS = [
    {"row": n, "request": f"Count to {n}.", "reference": str(n), "base": f"b{n}", "tuned": f"t{n}"}
    for n in range(1, 5)
]


def completion(text: str, **more: Any) -> dict[str, Any]:
    """Return an answer as an OpenAI-compatible server sends it."""
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop", **more}]}


def prefers(letter: str) -> dict[str, Any]:
    return completion(json.dumps({"reason": "It is right.", "better": letter}))


def likes_tuned(body: Mapping[str, Any]) -> dict[str, Any]:
    """A judge who looks at the answers, not at their order."""
    shown = body["messages"][1]["content"]
    return prefers("A" if "<answer_A>\nt" in shown else "B")


@pytest.fixture
def judged_recipe(write_recipe: WriteRecipe) -> Callable[..., Recipe]:
    """Writes a recipe with the judge of a server."""

    def write(url: str, **settings: Any) -> Recipe:
        return load_recipe(write_recipe(evaluate={"judge": {"server": url, **settings}}))

    return write


def test_a_real_server_judges_and_its_replies_are_kept(judged_recipe: Any, tmp_path: Path) -> None:
    with served(embedded_file(EMBEDDED), 1024) as url:
        recipe = judged_recipe(url, max_tokens=80)
        figures = judge_answers(recipe, ANSWERS[:1], tmp_path)
        assert figures["problem"] is None
        assert figures["state"] == "done"
        assert figures["rows_judged"] == 1
        assert figures["requests"] == 2
        assert figures["model"].endswith(".gguf")
        assert figures["on_npu"] is None
        assert 0 <= figures["agreement"] <= 1
        assert "does not say what runs it, so it may take GPU memory" in figures["warnings"][0]
        again = judge_answers(recipe, ANSWERS[:1], tmp_path)
    assert (again["requests"], again["requests_kept"]) == (0, 2)
    assert again["rows"] == figures["rows"]


def test_a_judge_that_looks_at_the_answers_agrees_in_both_orders(
    judged_recipe: Any, tmp_path: Path
) -> None:
    same = {**ANSWERS[0], "row": 9, "tuned": "b1"}
    with serving({**MODELS, CHAT: likes_tuned}) as (url, seen):
        figures = judge_answers(judged_recipe(url), [*ANSWERS, same], tmp_path)
    assert figures["outcomes"] == {"tuned": 4, "base": 0, "tie": 0, "undecided": 0}
    assert (figures["agreement"], figures["first_preferred"]) == (1, 0.5)
    assert figures["rows_same"] == 1
    assert figures["tuned_preferred"]["share"] == pytest.approx(4.5 / 5)
    assert figures["on_npu"] is True
    assert figures["warnings"] == []
    bodies = [body for path, body in seen if path == CHAT]
    assert len(bodies) == 8
    assert bodies[0]["temperature"] == 0
    assert bodies[0]["response_format"]["json_schema"]["schema"]["required"] == ["reason", "better"]
    html = Judged(figures, [*ANSWERS, same])._repr_html_()
    assert "m on the NPU" in html
    assert "0.90" in html


def test_a_judge_that_takes_the_first_answer_is_found_out(
    judged_recipe: Any, tmp_path: Path
) -> None:
    with serving({**MODELS, CHAT: lambda _: prefers("A")}) as (url, _):
        figures = judge_answers(judged_recipe(url), ANSWERS, tmp_path)
    assert figures["outcomes"]["undecided"] == 4
    assert (figures["agreement"], figures["first_preferred"]) == (0, 1)
    assert figures["tuned_preferred"]["share"] == 0.5
    assert not figures["tuned_preferred"]["clear"]


def test_a_reply_without_a_verdict_counts_as_none(judged_recipe: Any, tmp_path: Path) -> None:
    replies = iter(
        ["I cannot say."] + ['<think>{"x": "?"}</think> {"reason":"","better":"tie"}'] * 9
    )
    with serving({**MODELS, CHAT: lambda _: completion(next(replies))}) as (url, _):
        figures = judge_answers(judged_recipe(url), ANSWERS, tmp_path)
    assert (figures["rows_failed"], figures["rows_judged"]) == (1, 3)
    assert figures["outcomes"]["tie"] == 3
    assert figures["rows"][0]["problem"] == "the reply holds no verdict: 'I cannot say.'"


def test_a_reply_that_was_cut_says_so(judged_recipe: Any, tmp_path: Path) -> None:
    cut = completion('{"reason": "it', finish_reason="length")
    with serving({**MODELS, CHAT: lambda _: cut}) as (url, _):
        figures = judge_answers(judged_recipe(url, max_tokens=20), ANSWERS[:1], tmp_path)
    assert figures["rows"][0]["problem"].endswith("; it was cut after 20 tokens")


def test_a_row_that_is_refused_is_one_row(judged_recipe: Any, tmp_path: Path) -> None:
    def too_long(body: Mapping[str, Any]) -> Any:
        if "Count to 2." in body["messages"][1]["content"]:
            return 400, {"error": {"message": "the request exceeds the context"}}
        return likes_tuned(body)

    with serving({**MODELS, CHAT: too_long}) as (url, _):
        figures = judge_answers(judged_recipe(url), ANSWERS, tmp_path)
    assert (figures["rows_failed"], figures["rows_judged"]) == (1, 3)
    assert "exceeds the context" in figures["rows"][1]["problem"]
    assert figures["state"] == "done"


def test_a_server_that_knows_no_schemas_is_asked_without(
    judged_recipe: Any, tmp_path: Path
) -> None:
    def strict(body: Mapping[str, Any]) -> Any:
        if "response_format" in body:
            return 400, {"error": {"message": "unknown field response_format"}}
        return likes_tuned(body)

    with serving({**MODELS, CHAT: strict}) as (url, seen):
        figures = judge_answers(judged_recipe(url), ANSWERS, tmp_path)
    assert figures["rows_judged"] == 4
    assert len([path for path, _ in seen if path == CHAT]) == 9


def test_what_was_judged_before_a_server_died_is_kept(judged_recipe: Any, tmp_path: Path) -> None:
    count = iter(range(99))

    def dies(body: Mapping[str, Any]) -> Any:
        return likes_tuned(body) if next(count) < 2 else Raw(b"no key", 401)

    with serving({**MODELS, CHAT: dies}) as (url, _):
        figures = judge_answers(judged_recipe(url), ANSWERS, tmp_path)
    assert (figures["state"], figures["rows_judged"]) == ("stopped", 1)
    assert "answers 401: no key; export STRIXFT_API_KEY=" in figures["problem"]
    assert "1 of 4 rows were judged" in Judged(figures, ANSWERS)._repr_html_()


def test_a_run_ends_well_without_its_judge_and_shows_another(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing a judge does may end a run: the first one is not even there."""
    monkeypatch.setattr("strixft.servers.client.FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("STRIXFT_API_KEY", "open-sesame-1234")
    with serving({}) as (url, _):
        pass
    run = open_run(write_recipe(evaluate={"judge": {"server": url}}), tmp_path / "run")
    trained(run)
    evaluated = evaluate_recipe(run)
    assert evaluated.figures["judge"]["state"] == "failed"
    assert "no server answers at" in evaluated.figures["judge"]["problem"]
    assert evaluated.figures["metrics"]["loss"].keys() == {"base", "tuned"}
    assert "The judge ended early, 0 of" in render_report(run)

    figures = judged_by_a_server_that_tells_the_key(run, tmp_path)
    write_json(
        run.stage_folder("evaluate") / "result.json",
        {**evaluated.to_dict(), "figures": {**evaluated.figures, **figures}},
    )
    html = render_report(run)
    assert "<h2>Judge</h2>" in html
    assert "Your key is [secret]" in html
    assert ["tuned preferred by the judge", "0.500"] in Comparison([run]).results()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in written if path.parent.name == "answers"]) == 8
    assert not [path for path in written if b"open-sesame-1234" in path.read_bytes()]


def judged_by_a_server_that_tells_the_key(run: Run, cache: Path) -> dict[str, Any]:
    told = completion('{"reason": "Your key is open-sesame-1234", "better": "A"}')
    with serving({**MODELS, CHAT: lambda _: told}) as (url, seen):
        evaluate = run.recipe.evaluate.model_copy(update={"judge": Judge(server=url)})
        recipe = run.recipe.model_copy(update={"evaluate": evaluate})
        figures = judge_answers(recipe, ANSWERS, cache)
    assert seen[0] == ("/v1/models", {"authorization": "Bearer open-sesame-1234"})
    return {"answers": ANSWERS, "judge": figures}


def test_the_order_decides_what_stands_where() -> None:
    text = messages_for("Be {strict}.", ANSWERS[0], ("tuned", "base"))
    assert "Be {strict}." in text[0]["content"]
    assert text[1]["content"].index("t1") < text[1]["content"].index("b1")


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ('```json\n{"reason": "x", "better": "A"}\n```', ("tuned", "x")),
        ('{"better": " tie ", "reason": "x"}', ("tie", "x")),
        ('{"better": "C", "reason": "x"}', None),
        ('{"better": 1, "reason": "x"}', None),
        ('{"better": "A"', None),
        ("{" * 3000, None),
        ("", None),
    ],
)
def test_verdicts(reply: str, verdict: object) -> None:
    assert read_verdict(reply, ("tuned", "base")) == verdict


def test_objects_are_found_in_words() -> None:
    assert find_object('{no} {"a": "1"} {"a": "2"}', ["a"]) == {"a": "1"}


def test_nothing_to_judge_is_no_division_by_zero() -> None:
    figures = sum_up([], 0, 0)
    assert figures["agreement"] is figures["tuned_preferred"] is figures["first_preferred"] is None
    assert sum_up([], 2, 0)["tuned_preferred"]["share"] == 0.5


def test_an_offline_recipe_asks_no_other_machine(judged_recipe: Any, tmp_path: Path) -> None:
    recipe = judged_recipe("http://192.0.2.1:80")
    figures = judge_answers(recipe.model_copy(update={"offline": True}), ANSWERS, tmp_path)
    assert "the recipe is offline" in figures["problem"]
