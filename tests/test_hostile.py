"""What comes from data, models and recipes may be hostile: it is shown, and does nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import WriteRecipe, chat, chats

import strixft
from strixft.app.notebooks import run_notebook
from strixft.app.report import write_report
from strixft.run.open import open_run, run_folder
from strixft.support.errors import RecipeError, StrixftError

SCRIPT = "<script>alert(1)</script>"
IMAGE = '"><img src=x onerror=alert(2)>'
ANSI = "\x1b]0;title\x07\x1b[2J"
MARKDOWN = "[click](javascript:alert(3)) `$(touch ran)` $\\text{x}$ | cell |"
TOKEN = "hf_" + "zY9" * 12
HOSTILE = f"{SCRIPT} {IMAGE} {ANSI} {MARKDOWN} {TOKEN}"


class _Tags(HTMLParser):
    """Collects what a browser would see as tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_data_stay_text_in_the_report(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    rows = [chat(f"{HOSTILE} {number}", f"{HOSTILE} {number}") for number in range(12)]
    recipe = write_recipe(
        rows=rows,
        dataset={"max_length": 512, "validation_fraction": 0.4},
        evaluate={"max_rows": 2},
        train={"epochs": 0.5, "tokens_per_update": 400},
    )
    run = open_run(recipe, tmp_path / "run")
    for stage in ("prepare", "plan", "train", "evaluate"):
        getattr(strixft, f"{stage}_recipe")(run)
    page = write_report(run).read_text()
    tags = _Tags(page)
    assert not {"script", "iframe", "object", "a"} & tags.seen
    assert not {name for name in tags.attributes if name.startswith("on")}
    assert "&lt;script&gt;alert(1)" in page
    assert "\x1b" not in page
    for file in run.folder.rglob("*.json"):
        assert TOKEN not in file.read_text(), file
    assert TOKEN not in page


def test_a_recipes_name_never_leaves_the_folder_of_runs(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    for name in ("..yaml", "...yaml"):
        with pytest.raises(RecipeError, match="is not a name for a run"):
            run_folder(tmp_path / name, None)
    assert run_folder(tmp_path / "mine.yaml", None) == tmp_path / "runs" / "mine"


def test_a_notebooks_parameters_stay_data(tmp_path: Path) -> None:
    cells = [
        nbformat.v4.new_code_cell('text: str = ""', metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("print(len(text))"),
    ]
    page = nbformat.v4.new_notebook(cells=cells)
    page.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python",
        "language": "python",
    }
    nbformat.write(page, tmp_path / "in.ipynb")
    text = "\"\"\"\nimport os; os.system('touch ran')\n'''\\"
    run_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", {"text": text})
    assert not Path("ran").exists()
    assert str(len(text)) in json.dumps(json.loads((tmp_path / "out.ipynb").read_text()))


def test_a_token_that_a_cell_prints_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "unusual-form-of-token")
    cell = nbformat.v4.new_code_cell("import os\nprint(os.environ['HF_TOKEN'])\n1 / 0")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "in.ipynb")
    with pytest.raises(StrixftError):
        run_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", {})
    text = (tmp_path / "out.ipynb").read_text()
    assert "unusual-form-of-token" not in text
    assert "[secret]" in text
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


WITHOUT_NETWORK = """
import socket, sys

tried = []
connect = socket.socket.connect

def refuse(self, address):
    if self.family == socket.AF_UNIX:
        return connect(self, address)
    tried.append(address)
    raise OSError(101, "Network is unreachable")

def no_name(host, *rest, **more):
    tried.append(host)
    raise socket.gaierror(-3, "Temporary failure in name resolution")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = no_name

import strixft
run = strixft.open_run(sys.argv[1], sys.argv[2])
for stage in ("prepare", "plan", "train", "evaluate"):
    getattr(strixft, f"{stage}_recipe")(run)
strixft.write_report(run)
print("tried:", tried)
"""


@pytest.mark.parametrize("offline", [True, False])
def test_a_run_on_local_files_asks_no_network(
    write_recipe: WriteRecipe, tmp_path: Path, offline: bool
) -> None:
    recipe = write_recipe(rows=chats(12), offline=offline, evaluate={"max_rows": 2})
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_NETWORK, recipe, tmp_path / "run"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "tried: []"


def test_offline_names_what_is_not_here_and_asks_nobody(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    recipe = write_recipe(model="nobody/nothing-of-this-name", offline=True)
    run = open_run(recipe, tmp_path / "run")
    with pytest.raises(RecipeError, match="'nobody/nothing-of-this-name' cannot be loaded"):
        strixft.prepare_recipe(run)
