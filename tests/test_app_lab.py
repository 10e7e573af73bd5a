"""`strixft lab`: a real JupyterLab, its token, its kernel; and the two pages for people."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
import pytest
from conftest import REPOSITORY, WriteRecipe

import strixft
from strixft.app import jupyter
from strixft.app.jupyter import lab_command, lab_environment, put_notebooks, write_kernel
from strixft.app.lab import ReportPage, list_recipes
from strixft.run.open import find_runs, open_run
from strixft.support.errors import HostError
from strixft.support.files import digest

NOTEBOOKS = REPOSITORY / "notebooks"


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _get(port: int, path: str, token: str | None = None) -> Any:
    headers = {"Authorization": f"token {token}"} if token else {}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.load(answer)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert process.poll() is None, "JupyterLab ended"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail("JupyterLab did not answer")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int, Path]]:
    """A running JupyterLab: its port, its pid and its folder; its token is `secret`."""
    folder, port = tmp_path_factory.mktemp("workspace"), _free_port()
    start = put_notebooks(folder) / "start-here.ipynb"
    write_kernel(folder / "kernels")
    environment = lab_environment(folder / "kernels") | {
        "JUPYTER_TOKEN": "secret",
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
    }
    command = lab_command(folder, start, port=port, browser=False)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, process)
        yield port, process.pid, folder
    finally:
        process.terminate()
        process.wait(30)


def test_it_listens_on_this_machine_only(server: tuple[int, int, Path]) -> None:
    port, pid, _ = server
    listening = [
        connection.laddr
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert port in {address.port for address in listening}


def test_without_the_token_nobody_gets_in(server: tuple[int, int, Path]) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        _get(server[0], "/api/contents")
    assert error.value.code == 403
    error.value.close()


def test_the_kernel_is_this_environment(server: tuple[int, int, Path]) -> None:
    specs = _get(server[0], "/api/kernelspecs", "secret")
    spec = specs["kernelspecs"]["python3"]["spec"]
    assert spec["argv"][0] == sys.executable
    assert spec["env"]["TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"] == "1"


def test_the_notebooks_are_there(server: tuple[int, int, Path]) -> None:
    listed = _get(server[0], "/api/contents/notebooks", "secret")
    names = {row["name"] for row in listed["content"]}
    assert {path.name for path in NOTEBOOKS.glob("*.ipynb")} <= names


def test_the_live_page_of_a_run_opens_in_any_browser(server: tuple[int, int, Path]) -> None:
    port, _, folder = server
    page = folder / "runs/mine/live.html"
    page.parent.mkdir(parents=True)
    page.write_text("<p>update 7</p>")
    url = f"http://127.0.0.1:{port}/files/runs/mine/live.html?token=secret"
    with urllib.request.urlopen(url, timeout=5) as answer:
        assert answer.read() == page.read_bytes()
        assert answer.headers.get_content_type() == "text/html"


def test_an_edited_notebook_is_left_alone_and_the_newer_one_lies_beside_it(tmp_path: Path) -> None:
    own = tmp_path / "notebooks/start-here.ipynb"
    own.parent.mkdir()
    own.write_text("mine")
    put_notebooks(tmp_path)
    assert own.read_text() == "mine"
    newer = own.with_name(f"start-here-{strixft.__version__}.ipynb")
    assert newer.read_bytes() == (NOTEBOOKS / own.name).read_bytes()


def test_a_copy_that_nobody_edited_is_replaced_by_a_newer_one(tmp_path: Path) -> None:
    copies = put_notebooks(tmp_path)
    known = json.loads((copies / jupyter.KNOWN).read_text())
    (copies / "start-here.ipynb").write_text("older")
    known["start-here.ipynb"] = digest(copies / "start-here.ipynb")
    (copies / jupyter.KNOWN).write_text(json.dumps(known))
    put_notebooks(tmp_path)
    for copy in copies.glob("*.ipynb"):
        assert copy.read_bytes() == (NOTEBOOKS / copy.name).read_bytes()


def test_a_folder_that_cannot_be_written_says_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "notebooks").touch()
    with pytest.raises(HostError, match=rf"cannot be copied to {tmp_path}/notebooks: ") as caught:
        put_notebooks(tmp_path)
    assert caught.value.fix.startswith("mkdir -p ~/strixft")


def test_a_clone_stays_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/start-here.ipynb").write_text("{}")
    monkeypatch.setattr(jupyter, "shipped", lambda kind: tmp_path / kind)
    copies = put_notebooks(tmp_path)
    assert copies == tmp_path / "runs/notebooks"
    assert [path.name for path in copies.glob("*.ipynb")] == ["start-here.ipynb"]
    assert find_runs() == []


def test_the_lab_asks_for_no_news_and_keeps_what_is_typed(server: tuple[int, int, Path]) -> None:
    port = server[0]
    listed = _get(port, "/lab/api/settings", "secret")["settings"]
    set_to = {one["id"]: one["schema"].get("properties", {}) for one in listed}
    saves = set_to["@jupyterlab/docmanager-extension:plugin"]["autosaveInterval"]
    assert saves["default"] == 10
    state = set_to["@jupyter-widgets/jupyterlab-manager:plugin"]["saveState"]
    assert state["default"] is True
    page = server[2] / "kernels/labconfig/page_config.json"
    assert json.loads(page.read_text())["disabledExtensions"] == dict.fromkeys(
        jupyter.DISABLED, True
    )


def test_a_token_is_made_and_a_given_one_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("JUPYTER_TOKEN", raising=False)
    made = [lab_environment(tmp_path)["JUPYTER_TOKEN"] for _ in range(2)]
    assert made[0] != made[1]
    assert len(made[0]) >= 32
    monkeypatch.setenv("JUPYTER_TOKEN", "given")
    assert lab_environment(tmp_path)["JUPYTER_TOKEN"] == "given"
    monkeypatch.setenv("JUPYTER_TOKEN", "")  # would let anybody in
    assert len(lab_environment(tmp_path)["JUPYTER_TOKEN"]) >= 32


def test_a_kernel_that_trains_has_time_to_save() -> None:
    command = jupyter.lab_command(Path("/w"), Path("/w/n.ipynb"), port=1, browser=False)
    assert "--KernelManager.shutdown_wait_time=120" in command


def test_start_lab_becomes_jupyterlab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[Any] = []
    (tmp_path / "recipes").mkdir()
    monkeypatch.setattr(os, "execve", lambda *words: started.extend(words))
    monkeypatch.setenv("STRIXFT_CACHE", str(tmp_path / "cache"))
    jupyter.start_lab(port=8899, browser=False)
    program, command, environment = started
    assert program == sys.executable
    assert command[1:3] == ["-m", "jupyterlab"]
    assert "--ServerApp.ip=127.0.0.1" in command
    assert "--ServerApp.port=8899" in command
    assert (tmp_path / "notebooks/start-here.ipynb").is_file()
    kernel = Path(environment["JUPYTER_PATH"].split(os.pathsep)[0]) / "kernels/python3/kernel.json"
    assert json.loads(kernel.read_text())["argv"][0] == sys.executable


def test_recipes_are_listed_with_what_they_do() -> None:
    html = list_recipes()._repr_html_()
    assert "<td>demo</td><td>embedded:smollm2-135m</td><td>lora</td>" in html
    assert "meta-llama/Llama-3.3-70B-Instruct" in html


def test_the_report_is_shown_in_a_frame_that_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text('<script>alert("x")</script>')
    html = ReportPage(path)._repr_html_()
    assert "<script>" not in html
    assert "sandbox" in html


# the two pages for people, run as a person would


def _outputs(path: Path) -> str:
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("data", {}).get("text/html", "") for output in outputs)


def test_start_here_goes_from_a_recipe_to_its_report(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe, folder = write_recipe(), tmp_path / "run"
    run = open_run(recipe, folder)
    strixft.prepare_recipe(run)
    strixft.plan_recipe(run)
    strixft.train_recipe(run)  # done before: the page finds it done, and evaluates in a kernel
    parameters = {"recipe": str(recipe), "run_dir": str(folder)}
    out = tmp_path / "out.ipynb"
    papermill.execute_notebook(
        NOTEBOOKS / "start-here.ipynb", out, parameters=parameters, progress_bar=False
    )
    html = _outputs(out)
    assert "demo" in html, "the recipes"
    assert "<iframe srcdoc=" in html, "the report"
    assert (folder / "report.html").is_file()
    assert run.is_done("evaluate")


def test_the_doctor_page_shows_the_findings(tmp_path: Path) -> None:
    out = tmp_path / "out.ipynb"
    papermill.execute_notebook(NOTEBOOKS / "00-doctor.ipynb", out, progress_bar=False)
    html = _outputs(out)
    assert "training-step" in html
    assert "<strong>ok</strong>" in html


def test_the_lab_starts_without_torch() -> None:
    code = "import sys, strixft.app.jupyter; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
