"""Merges of a quantised run, run from disk a layer at a time; and the better one is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WriteRecipe
from safetensors.torch import load_file, save_file
from test_train import trained

from strixft.errors import StageError
from strixft.export import candidates, export_recipe
from strixft.export.candidates import (
    CANDIDATES,
    ROWS,
    TOKENS,
    TRAINED,
    compare_merges,
    compared_rows,
    last_states,
)
from strixft.export.layerwise import Checkpoint
from strixft.export.merge import merge
from strixft.methods import METHODS
from strixft.model import load_adapter, load_base
from strixft.opening import open_run
from strixft.prepare import Prepared
from strixft.recipe import load_recipe
from strixft.report import render_report
from strixft.runs import Run
from strixft.train import ADAPTER

IDS = torch.arange(100, 140).unsqueeze(0)


@pytest.fixture(scope="module")
def trained_by(write_module_recipe: WriteRecipe, tmp_path_factory: Any) -> dict[str, Run]:
    """Trained runs by their method, each on a base of its own kind."""
    found = {}
    for method in ("qlora", "int8-lora"):
        recipe = write_module_recipe(method, method=method)
        found[method] = open_run(recipe, tmp_path_factory.mktemp("runs") / method)
        trained(found[method])
    return found


def adapter_of(run: Run) -> Path:
    return run.stage_folder("train") / ADAPTER


def functions_of(run: Run) -> Any:
    return candidates._functions(run.recipe, Path(run.recipe.model), adapter_of(run))


def whole_models(run: Run, folder: Path, write_recipe: WriteRecipe) -> dict[str, Any]:
    """The three functions as whole models: what was trained, and what each merge writes."""
    base = load_base(run.recipe, "cpu", torch.float32)
    found = {TRAINED: load_adapter(base, adapter_of(run)).eval()}
    for name, kept in zip(CANDIDATES, ("native", METHODS[run.recipe.method].base), strict=True):
        (folder / name).mkdir()
        merge(Path(run.recipe.model), adapter_of(run), folder / name, kept)
        recipe = load_recipe(write_recipe(name, model=str(folder / name)))
        found[name] = load_base(recipe, "cpu", torch.float32).eval()
    return found


@pytest.mark.parametrize("method", ["qlora", "int8-lora"])
def test_layer_by_layer_gives_the_logits_of_the_whole_model(
    method: str, trained_by: dict[str, Run], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    run, rows = trained_by[method], (IDS, IDS[:, :7])
    functions = functions_of(run)
    states = last_states(functions, rows)
    compared = 0
    for name, model in whole_models(run, tmp_path, write_recipe).items():
        with functions[CANDIDATES[0]].ending() as head, torch.no_grad():
            for hidden, ids in zip(states[name], rows, strict=True):
                ours = head(hidden, torch.arange(ids.shape[1]))
                torch.testing.assert_close(ours, model(ids).logits[0], atol=1e-5, rtol=1e-4)
                compared += 1
    assert compared == 6
    parameters = [p for function in functions.values() for p in function.model.parameters()]
    assert all(parameter.is_meta for parameter in parameters)  # nothing stays in memory


def rows_known_best_by(run: Run, better: str, worse: str) -> list[dict[str, Any]]:
    """Rows whose every next token speaks for one candidate and against the other."""
    functions = functions_of(run)
    states = last_states(functions, [IDS])
    with functions[CANDIDATES[0]].ending() as head:
        places = torch.arange(IDS.shape[1])
        scores = {name: head(states[name][0], places).log_softmax(-1) for name in CANDIDATES}
    tokens = (scores[better] - scores[worse]).argmax(-1).tolist()
    before = IDS[0].tolist()
    return [
        {"input_ids": [*before[: n + 1], tokens[n]], "trained": [False] * (n + 1) + [True]}
        for n in range(len(before))
    ]


def compare(run: Run, rows: Sequence[Any]) -> dict[str, Any]:
    return compare_merges(run.recipe, Path(run.recipe.model), adapter_of(run), rows)


@pytest.mark.parametrize("better", CANDIDATES)
def test_of_two_that_are_near_the_one_that_knows_the_rows_is_chosen(
    better: str, trained_by: dict[str, Run]
) -> None:
    """8-bit weights are so near the original ones that perplexity decides."""
    worse = next(name for name in CANDIDATES if name != better)
    found = compare(
        trained_by["int8-lora"], rows_known_best_by(trained_by["int8-lora"], better, worse)
    )
    figures = found["candidates"]
    assert found["rows"] == ROWS
    assert abs(figures[better]["kl"] - figures[worse]["kl"]) < candidates.SAME_KL
    assert figures[better]["perplexity"] < figures[worse]["perplexity"]
    assert found["chosen"] == better


def test_where_they_are_apart_the_nearer_to_the_trained_function_is_chosen(
    trained_by: dict[str, Run], tmp_path: Path
) -> None:
    """Large weights make 4 bits another function; rows that prefer the original change nothing."""
    run = trained_by["qlora"]
    for file in Path(run.recipe.model).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    factors = {name: 20 if "proj" in name else 3 for name in weights}
    large = {name: weight * factors[name] for name, weight in weights.items()}
    save_file(large, tmp_path / "model.safetensors", {"format": "pt"})
    recipe = run.recipe.model_copy(update={"model": str(tmp_path)})
    other = Run(run.folder, recipe)
    found = compare(other, rows_known_best_by(other, "original", "dequantised"))
    figures = found["candidates"]
    assert figures["original"]["kl"] - figures["dequantised"]["kl"] > 10 * candidates.SAME_KL
    assert figures["original"]["perplexity"] < figures["dequantised"]["perplexity"]
    assert found["chosen"] == "dequantised"


def test_only_the_better_one_is_written_and_said(trained_by: dict[str, Run]) -> None:
    run = trained_by["qlora"]
    result = export_recipe(run, ("merged",))
    made = result.figures["made"]["merged"]
    chosen = made["compared"]["chosen"]
    kept = {"original": "native", "dequantised": "nf4"}[chosen]
    again = run.folder / "again"
    again.mkdir()
    merge(Path(run.recipe.model), adapter_of(run), again, kept)
    written = load_file(Path(made["path"]) / "model.safetensors")
    for name, weight in load_file(again / "model.safetensors").items():
        torch.testing.assert_close(written[name], weight, atol=0, rtol=0)
    assert made["compared"]["rows"] == len(
        run.require(Prepared).token_rows(run.recipe.dataset).validation
    )
    for page in (render_report(run), (Path(made["path"]) / "README.md").read_text()):
        assert "KL to the trained function" in page
        assert chosen in page


def test_rows_that_are_compared_have_a_bound() -> None:
    short = {"input_ids": [1] * 10}
    long = {"input_ids": [1] * (TOKENS + 1)}
    assert len(compared_rows([short] * 100)) == ROWS
    assert compared_rows([long, short]) == [long]
    assert compared_rows([short, long, short]) == [short, short]


def test_a_base_without_a_tensor_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_model / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(StageError, match=r"has no model\.norm\.weight") as caught:
        Checkpoint(tmp_path, "cpu").read("model.norm.weight")
    assert "download the base model again" in caught.value.fix
