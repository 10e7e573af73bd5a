"""A real JupyterLab in a real browser: the run is seen while it goes on, and found again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import chats, recipe_writer

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="apt-get install chromium")

PATIENCE_MS = 90_000


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[tuple[str, Path]]:
    """Address of a lab that `strixft lab` started, and its folder; its recipe takes long."""
    folder = tmp_path_factory.mktemp("workspace")
    recipes = folder / "recipes"
    recipes.mkdir()
    recipe_writer(recipes, tiny_model)(
        "demo",
        rows=chats(60),
        train={"epochs": 60, "tokens_per_update": 100, "micro_batch": 1},
        dataset={"packing": False},
        evaluate={"max_rows": 2},
    )
    own = {name: str(folder / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
    environment = {**os.environ, **own, "HF_HUB_OFFLINE": "1"}
    environment.pop("JUPYTER_TOKEN", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "strixft", "lab", "--no-browser", "--port", "9100"],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    told = "".join(process.stderr.readline() for _ in range(3))
    address = re.search(r"http://127\.0\.0\.1:\S+", told)
    assert address, told
    assert "ssh -N -L" in told
    yield address[0], folder
    process.terminate()
    process.wait(30)


@pytest.fixture
def page(lab: tuple[str, Path]) -> Iterator[Any]:
    """A page of the lab; a request elsewhere or an error on the console fails the test."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE_MS)
        elsewhere, errors = [], []
        page.on("request", lambda one: elsewhere.append(one.url) if is_outside(one.url) else None)
        page.on("console", lambda one: errors.append(one.text) if one.type == "error" else None)
        _open(page, lab[0])
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
    page.locator("p:visible", has_text="From a recipe to a report").wait_for()


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


def test_an_error_is_two_lines_and_tables_are_aligned(page: Any, lab: tuple[str, Path]) -> None:
    notebook = lab[1] / "notebooks/30-train.ipynb"
    notebook.write_text(notebook.read_text().replace("recipes/demo.yaml", "dmeo"))
    page.goto(lab[0].replace("start-here", "30-train"))
    page.locator("p", has_text="Trains by the plan").wait_for()
    _run_all(page)
    page.get_by_text("there is no recipe 'dmeo'").wait_for()
    shown = page.locator(".jp-Notebook:visible").inner_text()
    assert "fix: did you mean 'demo'?" in shown
    assert "Traceback" not in shown
    _take_picture(page, "error")
    page.goto(lab[0])
    page.locator("p:visible", has_text="From a recipe to a report").wait_for()
    page.get_by_text("| Idle").wait_for()
    page.locator(".cm-line:visible", has_text="list_recipes").click()
    page.keyboard.press("Shift+Enter")
    cell = page.locator("table.sx td:visible").first
    cell.wait_for()
    assert cell.evaluate("cell => getComputedStyle(cell).textAlign") == "left"


def test_a_run_is_seen_found_again_stopped_and_resumed(page: Any, lab: tuple[str, Path]) -> None:
    _run_all(page)
    first = _wait_for_update(page, 2)
    page.reload()
    page.locator("p:visible", has_text="From a recipe to a report").wait_for()
    _run_all(page)
    _wait_for_update(page, first + 2)
    _take_picture(page, "live")
    page.locator("button.sx-stop").last.click()
    page.get_by_text("train: stopped").last.wait_for()
    assert list((lab[1] / "runs/demo/train/checkpoints").glob("checkpoint-*/manifest.json"))
