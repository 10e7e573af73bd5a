"""The export of a trained run, started for real with llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import WriteRecipe
from http_server import serving
from test_train import trained

from strixft.errors import HostError, StageError
from strixft.export import Exported, export_recipe, gguf
from strixft.export.parity import END, chosen_prompts, compare
from strixft.export.texts import modelfile
from strixft.llama import served
from strixft.model import load_tokenizer
from strixft.recipe import load_recipe
from strixft.report import render_report
from strixft.runs import Run, open_run
from strixft.servers import ask


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Exported]:
    """A tiny run with everything exported."""
    import yaml
    from conftest import chats, write_lines

    folder = tmp_path_factory.mktemp("export")
    write_lines(folder / "tiny.jsonl", chats(24))
    recipe = {
        "model": str(tiny_model),
        "dataset": {"source": "tiny.jsonl", "max_length": 256, "validation_fraction": 0.2},
        "train": {"epochs": 1, "learning_rate": 2e-3, "tokens_per_update": 100},
        "memory": {"reserve_gib": 0.5},
        "export": {"to": ["ollama", "lemonade", "vllm"], "gguf": ["f16", "q8_0"]},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    run = open_run(folder / "tiny.yaml", folder / "run")
    trained(run)
    return run, export_recipe(run)


def test_f16_answers_like_the_trained_model(exported: tuple[Run, Exported]) -> None:
    parity = exported[1].figures["parity"]
    assert parity["f16"]["prompts"] >= 50
    assert parity["f16"]["top1"] >= 0.99
    assert parity["f16"]["same_tokens"] == 1
    assert parity["f16"]["same_template"] is True
    assert parity["q8_0"]["top1"] > 0.8


def test_everything_that_a_server_needs_is_there(exported: tuple[Run, Exported]) -> None:
    run, result = exported
    made = result.figures["made"]
    assert list(made) == ["merged", "gguf", "ollama", "lemonade", "vllm"]
    assert all(Path(row["path"]).exists() for row in made.values() if "path" in row)
    assert "q8_0.gguf --recipe llamacpp" in made["lemonade"]["type"]
    card = (Path(made["merged"]["path"]) / "README.md").read_text()
    assert "answers like the trained model" in card
    assert "<h2>Export</h2>" in render_report(run)


def test_the_modelfile_writes_what_the_template_writes(exported: tuple[Run, Exported]) -> None:
    tokenizer = load_tokenizer(exported[0].recipe)
    text = modelfile("x.gguf", tokenizer)
    template = text.split('"""')[1]
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    filled = template.replace("{{ .System }}", "Be brief.").replace("{{ .Prompt }}", "Hi")
    wanted = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert filled == f"{wanted}{{{{ .Response }}}}"
    assert f'PARAMETER stop "{tokenizer.eos_token}"' in text
    assert "You are a helpful AI assistant named SmolLM" in text.split("SYSTEM")[1]


def test_another_model_is_marked_as_differing(exported: tuple[Run, Exported]) -> None:
    """Answers that the model would not give must be seen as such, by the real server."""
    run, result = exported
    tokenizer = load_tokenizer(run.recipe)
    path = Path(result.figures["made"]["gguf"]["path"])
    prompt = chosen_prompts(tokenizer, [])[0]
    with served(path, 256) as url:
        own = ask(
            f"{url}/completion",
            {"prompt": prompt, "n_predict": 4, "temperature": 0, "return_tokens": True},
        )["tokens"]
        assert compare(url, prompt, own) == (4, 4)
        wrong = [own[0], (own[1] + 1) % 1000 + 5, END]
        first, agreed = compare(url, prompt, wrong)
    assert first == 1
    assert agreed < 3


def test_below_the_bound_is_an_error(exported: tuple[Run, Exported]) -> None:
    figures = exported[1].figures
    row = {**figures["parity"]["f16"], "top1": 0.5, "passes": False}
    bad = Exported(
        folder=Path(), started="", seconds=0, versions={}, host={}, inputs={},
        figures={**figures, "parity": {"f16": row}},
    )  # fmt: skip
    assert bad.differs == ["f16"]
    with pytest.raises(StageError, match=r"differs .* same next token 0\.500 \(at least 0\.99\)"):
        bad.require_parity()


def test_a_file_that_is_no_gguf_does_not_start(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"no model")
    with pytest.raises(StageError, match=r"llama\.cpp does not start"), served(path, 64):
        pass


def test_a_converter_that_refuses_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    with pytest.raises(StageError, match=r"cannot write x\.gguf"):
        gguf.convert_model(tmp_path, tmp_path / "x.gguf", "f16")
    assert not list(tmp_path.glob("*.gguf"))


def test_a_folder_that_is_no_llama_cpp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(gguf.LLAMA_CPP, str(tmp_path))
    with pytest.raises(HostError, match=r"has no convert_hf_to_gguf\.py"):
        gguf.convert_model(tmp_path, tmp_path / "x.gguf", "f16")


def test_what_needs_llama_quantize_says_so_first(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    recipe = load_recipe(write_recipe(export={"gguf": ["q4_k_m"]}))
    with pytest.raises(HostError, match="llama-quantize is not on this machine"):
        gguf.require_tools(("gguf",), recipe.export.gguf)


def test_more_kinds_are_made_beside_what_was_there(tiny_run: Run) -> None:
    trained(tiny_run)
    export_recipe(tiny_run, ("merged",))
    export_recipe(tiny_run, ("vllm",))
    again = export_recipe(tiny_run, ("merged",))
    assert list(again.figures["made"]) == ["merged", "vllm"]
    assert (tiny_run.folder / "export.1" / "result.json").is_file()


def test_the_end_of_an_answer_counts_as_a_token() -> None:
    """llama.cpp gives the end token back as the last one, whatever its number."""
    said = {"tokens": [7, 8, 2], "stop_type": "eos"}
    with serving({"/completion": lambda _: said}) as (url, _):
        assert compare(url, [1], [7, 8, END]) == (3, 3)
        assert compare(url, [1], [7, 8, 9])[0] == 2
