"""A real JupyterLab in a real browser: the run is seen while it goes on, and found again."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import chats, recipe_writer, write_lines
from test_train import trained

from strixft.evaluate.stage import evaluate_recipe
from strixft.run.open import find_run, open_run

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="apt-get install chromium")

PATIENCE_MS = 180_000


class Lab:
    """A lab that `strixft lab` started, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:  # workers of a parallel test have a lab each
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
        own = {name: str(self.folder / name) for name in names}
        environment = {**os.environ, **own, "HF_HUB_OFFLINE": "1"}
        environment.pop("JUPYTER_TOKEN", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "strixft", "lab", "--no-browser", "--port", str(self.port)],
            cwd=self.folder,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        told = "".join(self.process.stderr.readline() for _ in range(3))
        address = re.search(r"http://127\.0\.0\.1:\S+", told)
        assert address, told
        assert "ssh -N -L" in told
        self.address = address[0]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Lab]:
    """A lab with a recipe that takes long, and a run `small` that is trained and evaluated."""
    folder = tmp_path_factory.mktemp("workspace")
    recipes = folder / "recipes"
    recipes.mkdir()
    write = recipe_writer(recipes, tiny_model)
    write(
        "demo",
        rows=chats(60),
        train={"epochs": 60, "tokens_per_update": 100, "micro_batch": 1},
        dataset={"packing": False},
        evaluate={"max_rows": 2},
    )
    small = open_run(write("small", evaluate={"max_rows": 2}), folder / "runs/small")
    trained(small)
    evaluate_recipe(small)
    started = Lab(folder)
    yield started
    started.process.terminate()
    started.process.wait(30)


def _cells(lab: Lab, *cells: str) -> str:
    """Write a notebook of these cells, and return its address."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(one) for one in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "strixft"}
    nbformat.write(notebook, lab.folder / "notebooks/cells.ipynb")
    return lab.address.replace("start-here", "cells")


@pytest.fixture
def page(lab: Lab) -> Iterator[Any]:
    """A page of the lab; a request elsewhere or an error on the console fails the test."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE_MS)
        elsewhere, errors = [], []
        page.on("request", lambda one: elsewhere.append(one.url) if is_outside(one.url) else None)
        page.on("console", lambda one: errors.append(one.text) if one.type == "error" else None)
        _open(page, f"{lab.address}&reset")  # not the tabs of another test
        yield page
        _take_picture(page, "last")
        browser.close()
        assert elsewhere == []
        assert errors == []


def _take_picture(page: Any, name: str) -> None:
    """Save what the browser shows where somebody asks for it, to be looked at."""
    if "STRIXFT_PICTURES" in os.environ:
        page.screenshot(path=f"{os.environ['STRIXFT_PICTURES']}/{name}.png")


def is_outside(url: str) -> bool:
    return url.startswith(("http:", "https:", "ws:")) and "//127.0.0.1:" not in url


def _open(page: Any, address: str) -> None:
    for _ in range(120):
        try:
            page.goto(address)
            break
        except playwright.Error:
            time.sleep(0.5)
    page.locator(".jp-Notebook:visible .jp-Cell").first.wait_for()


def _run_all(page: Any) -> None:
    page.get_by_text("| Idle").wait_for()  # before its kernel is there, a cell is passed over
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()


def _to_the_end(page: Any) -> None:
    page.locator(".jp-WindowedPanel-outer:visible").evaluate(
        "panel => panel.scrollTop = panel.scrollHeight"
    )


def _update(page: Any) -> int:
    _to_the_end(page)
    shown = page.locator(".sx-live").all()
    text = shown[-1].inner_text() if shown else ""
    found = re.search(r"train: running, update ([\d,]+)", text)
    return int(found[1].replace(",", "")) if found else 0


def _wait_for_update(page: Any, update: int) -> int:
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while (seen := _update(page)) < update:
        assert time.monotonic() < deadline, page.locator("body").inner_text()[-2000:]
        time.sleep(0.3)
    return seen


def test_an_error_is_a_card_and_tables_are_aligned(page: Any, lab: Lab) -> None:
    page.goto(_cells(lab, "import strixft as sx\nsx.list_recipes()", "sx.open_run('dmeo')"))
    page.locator(".jp-Notebook:visible .jp-Cell").first.wait_for()
    _run_all(page)
    shown = page.locator(".sx-card:visible")
    shown.get_by_text("there is no recipe 'dmeo'").first.wait_for()
    assert "did you mean 'demo'?" in shown.inner_text()
    assert "Traceback" not in page.locator(".jp-Notebook:visible").inner_text()
    shown.locator("summary").click()
    assert "Traceback" in shown.inner_text()  # folded until it is asked for
    cell = page.locator("table.sx td:visible").first
    assert cell.evaluate("cell => getComputedStyle(cell).textAlign") == "left"
    _take_picture(page, "error")


RUN = ("import strixft as sx", "sx.run_recipe('recipes/demo.yaml')")


def test_a_run_outlives_page_kernel_and_lab_and_is_paused_resumed_and_stopped(
    page: Any, lab: Lab
) -> None:
    page.goto(_cells(lab, *RUN))
    page.locator(".jp-Notebook:visible .jp-Cell").first.wait_for()
    _run_all(page)
    first = _wait_for_update(page, 2)
    page.keyboard.press("Control+s")
    page.reload()
    page.locator(".jp-Notebook:visible .jp-Cell").first.wait_for()
    _run_all(page)
    seen = _wait_for_update(page, first + 2)
    _take_picture(page, "live")

    page.locator("button.sx-pause").last.click()
    page.get_by_text("train: paused").last.wait_for()
    run = find_run(lab.folder / "runs/demo")
    assert run.status()["state"] == "paused"
    saved = max(int(p.name.split("-")[1]) for p in run.folder.glob("train/checkpoints/check*"))
    assert saved >= seen
    _take_picture(page, "paused")
    page.locator("button.sx-resume").last.click()
    _wait_for_update(page, saved + 1)
    updates = [json.loads(line) for line in (run.folder / "train/log.jsonl").open()]
    again = [one["update"] for one in updates if one.get("first")]
    assert again[-1] == saved + 1  # the same stage went on exactly

    worker = run.workers()[-1]
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_text("Restart Kernel…", exact=True).click()
    with page.expect_response(re.compile("/restart")):
        page.locator("button.jp-mod-accept").click()
    page.goto("about:blank")  # a page that asks a dead lab has errors on its console
    lab.kill()
    assert worker in run.workers()
    lab.start()
    _open(page, lab.address.replace("start-here", "cells"))
    assert page.get_by_text("Error displaying widget").count() == 0
    _run_all(page)
    _wait_for_update(page, saved + 2)
    assert worker in run.workers()
    page.locator("button.sx-stop").last.click()
    page.locator("button.sx-resume").last.wait_for()  # it comes when all processes have ended
    assert page.get_by_text("train: stopped").count() > 0
    assert run.workers() == []
    assert list(run.folder.glob("train/checkpoints/checkpoint-*/manifest.json"))


def test_the_form_takes_a_file_plans_starts_and_finds_its_run_again(
    page: Any, lab: Lab, tmp_path: Path
) -> None:
    data = write_lines(tmp_path / "my <b>own.jsonl", chats(60))
    _run_all(page)
    new = page.locator(".sx-form button:visible", has_text="New run")
    new.or_(page.locator(".sx-form .sx-section:visible")).first.wait_for()
    if new.count():  # a run of another test is shown
        new.click()
    page.locator(".sx-tabs button:visible", has_text="Upload a file").click()
    with page.expect_file_chooser() as chooser:
        page.locator("button.jupyter-button:visible", has_text="Choose a file").click()
    chooser.value.set_files(data)
    page.locator(".sx-command:visible", has_text="own.jsonl").first.wait_for()
    page.locator(".sx-said:visible", has_text="rows to train").wait_for()
    says = page.locator(".sx-says:visible")
    says.filter(has_text="Fits: ").wait_for()
    ready = page.locator("button.sx-start:not([disabled])", has_text="Start")
    ready.wait_for()
    before = says.inner_text()
    page.locator(".noUi-handle:visible").first.focus()
    page.keyboard.press("ArrowRight")
    says.filter(has_not_text=before).wait_for()
    assert "about" in says.inner_text() or says.inner_text() != before
    page.locator(".sx-command:visible", has_text="demo").first.wait_for()
    _take_picture(page, "form")
    page.set_viewport_size({"width": 700, "height": 900})
    wide = page.locator(".sx-form:visible").evaluate("form => form.scrollWidth - form.clientWidth")
    assert wide <= 1, "nothing is cut in a window of 700 pixels"
    page.set_viewport_size({"width": 1280, "height": 900})
    ready.click()
    first = _wait_for_update(page, 2)
    page.reload()
    page.locator(".jp-Notebook:visible .jp-Cell").first.wait_for()
    _run_all(page)
    _wait_for_update(page, first + 1)
    assert "own.jsonl" in page.locator(".sx-facts:visible").inner_text()
    page.locator("button.sx-stop").last.click()
    page.get_by_text("train: stopped").last.wait_for()


def test_a_finished_run_is_judged_talked_to_and_exported(page: Any, lab: Lab) -> None:
    page.goto(_cells(lab, "import strixft as sx", "sx.finish('small')"))
    page.locator(".jp-Notebook:visible .jp-Cell").first.wait_for()
    _run_all(page)
    page.locator(".sx-verdict", has_text="held-out rows: loss").wait_for()
    chat = page.locator(".sx-chat-box")
    chat.locator("input[type=text]").fill("Count to <b>3</b>.\x1b[31m")
    page.keyboard.press("Enter")
    chat.locator(".sx-asked", has_text="Count to <b>3</b>.").wait_for()
    ready = chat.locator("button:not([disabled])", has_text="Send")
    ready.wait_for()
    assert chat.locator(".sx-answer").count() == 2
    chat.locator("button", has_text="tuned").nth(1).click()
    chat.locator("input[type=text]").fill("And to 4?")
    page.keyboard.press("Enter")
    chat.locator(".sx-asked").nth(1).wait_for()
    ready.wait_for()
    assert chat.locator(".sx-answer").count() == 3
    _take_picture(page, "chat")

    page.locator(".lm-TabBar-tabLabel:visible", has_text="Export").last.click()
    page.locator("button.sx-make-q8_0").click()
    link = page.locator("a.sx-download:visible", has_text="small-q8_0.gguf")
    link.wait_for()
    with page.expect_download() as download:
        link.click()
    saved = Path(download.value.path())
    assert saved.read_bytes() == (lab.folder / "runs/small/export/small-q8_0.gguf").read_bytes()
    assert download.value.suggested_filename == "small-q8_0.gguf"
    _take_picture(page, "export")


def test_runs_are_listed_renamed_deleted_and_brought_back(page: Any, lab: Lab) -> None:
    run = find_run(lab.folder / "runs/small")
    shutil.copytree(run.folder, run.folder.with_name("other"))
    page.goto(_cells(lab, "import strixft as sx", "sx.runs()"))
    page.locator(".jp-Notebook:visible .jp-Cell").first.wait_for()
    _run_all(page)
    row = page.locator(".sx-run-row", has_text="other")
    row.locator("input").check()
    page.get_by_placeholder("new name, or a note").fill("<i>best</i>")
    page.locator("button.sx-runs-note").click()
    row.get_by_text("<i>best</i>").wait_for()
    page.get_by_placeholder("new name, or a note").fill("best-one")
    page.locator("button.sx-runs-rename").click()
    row = page.locator(".sx-run-row", has_text="best-one")
    row.locator("input").check()
    _take_picture(page, "runs")
    page.locator("button.sx-runs-delete").click()
    page.get_by_text("Restore brings a run back").wait_for()
    assert not run.folder.with_name("best-one").exists()
    page.locator("button.sx-runs-restore").click()
    page.get_by_text("best-one is back").wait_for()
    assert find_run(run.folder.with_name("best-one")).is_done("train")
