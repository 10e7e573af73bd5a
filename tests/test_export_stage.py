"""The export of a trained run, started for real with llama.cpp."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import WriteRecipe, chat
from http_server import serving
from test_train import trained
from transformers import AutoModelForCausalLM, AutoTokenizer

from strixft.app.report import render_report
from strixft.catalog.exports import QUANTISATIONS
from strixft.data.end_tokens import Ends
from strixft.export.parity import END, chosen_prompts, compare, measure_parity
from strixft.export.result import Exported
from strixft.export.server_files import modelfile
from strixft.export.stage import export_recipe
from strixft.model.source import load_tokenizer
from strixft.prepare.stage import Prepared
from strixft.run.folder import Run
from strixft.run.open import open_run
from strixft.servers import gguf, llama_cpp
from strixft.servers.llama_cpp import served
from strixft.support.errors import RecipeError, StageError
from strixft.support.http import ask

ENDS = Ends((2,), ("<|im_end|>", '\n### "User":'))


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
        "export": {
            "to": ["ollama", "lemonade", "vllm", "gguf-lora"],
            "gguf": ["f16", "q8_0", "q4_k_m"],
        },
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


def test_the_adapter_alone_answers_like_the_trained_model(exported: tuple[Run, Exported]) -> None:
    figures = exported[1].figures
    assert figures["parity"]["gguf-lora"]["passes"]
    assert figures["parity"]["gguf-lora"]["tokens"] == figures["parity"]["f16"]["tokens"]
    path = Path(figures["made"]["gguf-lora"]["path"])
    assert path.stat().st_size < Path(figures["made"]["gguf"]["path"]).stat().st_size / 4
    assert sorted(file.name for file in path.parent.glob("*.gguf")) == [
        "run-f16.gguf", "run-lora-f16.gguf", "run-q4_k_m.gguf", "run-q8_0.gguf",
    ]  # fmt: skip


def test_a_file_of_four_bits_is_served_and_compared(exported: tuple[Run, Exported]) -> None:
    """A random model's answers hang on little; the bound is for trained ones."""
    parity = exported[1].figures["parity"]
    assert parity["q4_k_m"]["top1"] > 0.5
    assert parity["q4_k_m"]["tokens"] == parity["f16"]["tokens"]
    sizes = [
        path.stat().st_size for path in map(Path, exported[1].figures["made"]["gguf"]["files"])
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_everything_that_a_server_needs_is_there(exported: tuple[Run, Exported]) -> None:
    run, result = exported
    made = result.figures["made"]
    assert list(made) == ["merged", "gguf", "gguf-lora", "ollama", "lemonade", "vllm"]
    assert all(Path(row["path"]).exists() for row in made.values() if "path" in row)
    lemonade = Path(made["lemonade"]["path"])
    assert f"extra_models_dir={lemonade.parent} " in made["lemonade"]["type"]
    assert lemonade.samefile(run.stage_folder("export") / "run-q4_k_m.gguf")
    assert list(lemonade.parent.iterdir()) == [lemonade]
    card = (Path(made["merged"]["path"]) / "README.md").read_text()
    assert "answers like the trained model" in card
    assert "<h2>Export</h2>" in render_report(run)


def test_the_modelfile_writes_what_the_template_writes(exported: tuple[Run, Exported]) -> None:
    tokenizer = load_tokenizer(exported[0].recipe)
    text = modelfile("x.gguf", tokenizer, ENDS)
    template = text.split('"""')[1]
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    filled = template.replace("{{ .System }}", "Be brief.").replace("{{ .Prompt }}", "Hi")
    wanted = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert filled == f"{wanted}{{{{ .Response }}}}"
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "\\n### \\"User\\":"\n' in text
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


def test_a_template_that_llama_cpp_cannot_express_is_said(
    exported: tuple[Run, Exported], tmp_path: Path
) -> None:
    run, result = exported
    folder = tmp_path / "merged"
    shutil.copytree(result.figures["made"]["merged"]["path"], folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role.ljust(12) + m.content }}{% endfor %}"
    )
    gguf.convert_model(folder, tmp_path / "x.gguf", "f16", ENDS.token_ids)
    tokenizer = load_tokenizer(run.recipe.model_copy(update={"model": str(folder)}))
    prompts = [([5, 6, 7], [8, 9])]
    row = measure_parity(tmp_path / "x.gguf", QUANTISATIONS["f16"], tokenizer, prompts)
    assert not row["passes"]
    bad = replace(result, figures={**result.figures, "parity": {"f16": row}})
    with pytest.raises(StageError, match=r"cannot express the chat template: .*ljust") as caught:
        bad.require_parity()
    assert "--chat-template-file" in caught.value.fix


def ask_after(signal_number: int, model: Path) -> None:
    """Start a server, send it a signal, ask it something."""
    with served(model, 64) as url:
        [child] = [
            c for c in psutil.Process().children() if "strixft.servers.llama_cpp" in c.cmdline()
        ]
        child.send_signal(signal_number)
        ask(f"{url}/completion", {"prompt": [5], "n_predict": 4}, timeout=2)


@pytest.mark.parametrize(
    ("signal_number", "told"), [(signal.SIGKILL, "ended with .*killed"), (signal.SIGSTOP, "hangs")]
)
def test_a_server_that_dies_or_hangs_is_said(
    signal_number: int, told: str, exported: tuple[Run, Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(exported[1].figures["made"]["gguf"]["path"])
    monkeypatch.setattr(llama_cpp, "ENDS_S", 1)
    with pytest.raises(StageError, match=f"llama.cpp's server {told}"):
        ask_after(signal_number, path)
    children = psutil.Process().children()
    assert not [c for c in children if "strixft.servers.llama_cpp" in " ".join(c.cmdline())]


def with_tools(model: Path, folder: Path, *, resized: bool) -> Path:
    """A copy of a model whose tokenizer has two tokens more."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<tool>", "<|call|>"])
    shutil.copytree(model, folder)
    tokenizer.save_pretrained(folder)
    if resized:
        whole = AutoModelForCausalLM.from_pretrained(model)
        whole.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        whole.save_pretrained(folder)
    return folder


TOOL_CHATS = [chat(f"<tool> adds {n} and 1 <|call|>.", f"<tool> {n + 1}") for n in range(24)]


def test_added_tokens_are_exported(
    tiny_model: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    model = with_tools(tiny_model, tmp_path / "tools", resized=True)
    recipe = write_recipe("tools", TOOL_CHATS, model=str(model), export={"gguf": ["f16"]})
    run = open_run(recipe, tmp_path / "run")
    trained(run)
    parity = export_recipe(run).figures["parity"]["f16"]
    assert parity["passes"]
    assert parity["same_tokens"] == 1
    tool = load_tokenizer(run.recipe).convert_tokens_to_ids("<tool>")
    prompts = [
        row["input_ids"] for row in run.require(Prepared).token_rows(run.recipe.dataset).validation
    ]
    assert all(tool in prompt for prompt in prompts)
    assert len(prompts) > 0


def test_tokens_that_only_the_tokenizer_has_are_refused(
    tiny_model: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    model = with_tools(tiny_model, tmp_path / "tools", resized=False)
    run = open_run(write_recipe("tools", TOOL_CHATS, model=str(model)), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"the token '<.*>', number \d+, and .* alone") as caught:
        trained(run)
    assert "resize_token_embeddings" in caught.value.fix


def test_a_server_that_does_not_start_in_time_is_said(
    exported: tuple[Run, Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(exported[1].figures["made"]["gguf"]["path"])
    monkeypatch.setattr(llama_cpp, "START_S", 0.05)
    with pytest.raises(StageError, match=r"does not start with .* within 0 s"), served(path, 64):
        pass


def test_below_the_bound_is_an_error(exported: tuple[Run, Exported]) -> None:
    figures = exported[1].figures
    row = {**figures["parity"]["f16"], "top1": 0.5, "passes": False}
    bad = replace(exported[1], figures={**figures, "parity": {"f16": row}})
    assert bad.differs == ["f16"]
    with pytest.raises(StageError, match=r"differs .* same next token 0\.500 \(at least 0\.99\)"):
        bad.require_parity()


def test_a_file_that_is_no_gguf_does_not_start(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"no model")
    with (
        pytest.raises(StageError, match=r"llama\.cpp (does not start|cannot load)"),
        served(path, 64),
    ):
        pass


def test_more_kinds_are_made_beside_what_was_there(tiny_run: Run) -> None:
    trained(tiny_run)
    export_recipe(tiny_run, ("merged",))
    export_recipe(tiny_run, ("vllm",))
    again = export_recipe(tiny_run, ("merged",))
    assert list(again.figures["made"]) == ["merged", "vllm"]
    assert (tiny_run.folder / "export.1" / "result.json").is_file()


def test_a_file_that_is_added_leaves_what_was_made(exported: tuple[Run, Exported]) -> None:
    """Its neighbours keep their bytes on disk, and are not compared a second time."""
    run, result = exported
    folder = run.stage_folder("export")
    before = {path.name: path.stat().st_ino for path in folder.rglob("*") if path.is_file()}
    again = export_recipe(run, ("q6_k",))
    after = {path.name: path.stat().st_ino for path in folder.rglob("*") if path.is_file()}
    for name in ("model.safetensors", "run-f16.gguf", "run-q4_k_m.gguf"):
        assert after[name] == before[name], name
    assert again.figures["kinds"] == result.figures["kinds"]
    assert again.figures["parity"] == result.figures["parity"] | {
        "q6_k": again.figures["parity"]["q6_k"]
    }
    assert export_recipe(run, ("q4_k_m",)) == again
    names = [row["name"] for row in again.rows]
    assert names == [
        *("merged", "f16", "q8_0", "q4_k_m", "q6_k"),
        *("gguf-lora", "ollama", "lemonade", "vllm"),
    ]
    assert all(row["type"] for row in again.rows)
    sizes = [Path(row["path"]).stat().st_size for row in again.rows[1:5]]
    assert sizes == [row["bytes"] for row in again.rows[1:5]]


def test_one_file_alone_can_be_asked_for(tiny_run: Run) -> None:
    trained(tiny_run)
    made = export_recipe(tiny_run, ("q8_0",))
    assert made.quantisations == ("q8_0",)
    assert [path.name for path in tiny_run.stage_folder("export").glob("*.gguf")] == [
        "run-q8_0.gguf"
    ]


def test_the_end_of_an_answer_counts_as_a_token() -> None:
    """llama.cpp gives the end token back as the last one, whatever its number."""
    said = {"tokens": [7, 8, 2], "stop_type": "eos"}
    with serving({"/completion": lambda _: said}) as (url, _):
        assert compare(url, [1], [7, 8, END]) == (3, 3)
        assert compare(url, [1], [7, 8, 9])[0] == 2
