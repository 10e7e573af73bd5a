"""The end of a run: a verdict with its interval, links, and commands that can be typed."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteRecipe
from test_train import trained

from strixft.app.cli import main
from strixft.app.export_box import NAMES, ExportBox, offers
from strixft.app.finish import finish_html, next_commands, sentences
from strixft.catalog.exports import KINDS, QUANTISATIONS
from strixft.evaluate.stage import evaluate_recipe
from strixft.evaluate.verdict import forgotten, verdict
from strixft.run.folder import Run
from strixft.run.open import open_run
from strixft.support.progress import following


def figures(base: float, tuned: float, *, clear: bool) -> dict[str, Any]:
    change = {"change": tuned - base, "low": tuned - base - 0.1, "high": tuned - base + 0.1}
    both = {"base": base, "tuned": tuned}
    names = ("loss", "general_loss")
    return {
        "metrics": dict.fromkeys(names, both),
        "changes": {name: {**change, "clear": clear} for name in names},
        "rows_loss": 33,
    }


def test_a_verdict_follows_the_interval() -> None:
    better = figures(2.0, 1.5, clear=True)
    assert verdict(better) == (
        "Better than the base on 33 held-out rows: loss 2.000 → 1.500 (-0.500, 95 % interval"
        " -0.600 to -0.400); lower is better."
    )
    assert verdict(figures(2.0, 2.5, clear=True)).startswith("Worse than the base")
    assert verdict(figures(2.0, 1.99, clear=False)).startswith("No clear difference from the base")
    assert forgotten(figures(2.0, 2.5, clear=True)).startswith("Some general ability was lost")
    assert forgotten(better).startswith("General texts got easier")
    assert forgotten(figures(2.0, 2.1, clear=False)).startswith("No clear change on general texts")


def test_figures_of_an_earlier_version_have_a_verdict_too() -> None:
    old = {"metrics": {"loss": {"base": 2.0, "tuned": 1.5}}}
    assert verdict(old) == "No clear difference from the base: loss 2.000 → 1.500; lower is better."
    assert forgotten(old) == ""


@pytest.fixture(scope="module")
def run(write_module_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained and evaluated run."""
    opened = open_run(write_module_recipe(), tmp_path_factory.mktemp("runs") / "my run")
    trained(opened)
    with following(PROGRESS.append):
        evaluate_recipe(opened)
    return opened


PROGRESS: list[dict[str, Any]] = []
"""What the evaluation of the run told on its way."""


@pytest.mark.usefixtures("run")
def test_an_evaluation_tells_how_far_it_is() -> None:
    for what in ("loss", "answers"):
        told = [(one["done"], one["total"]) for one in PROGRESS if one["what"] == what]
        assert any(done == total > 0 for done, total in told), what


def test_the_last_screen_has_the_verdict_and_three_commands(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is told can be typed: here the one that exports, with a kind that takes no time."""
    monkeypatch.chdir(run.folder.parent)
    assert [len(sentences(run)), len(next_commands(run))] == [2, 3]
    assert next_commands(run)[0] == "strixft chat 'my run' --both"
    words = shlex.split(next_commands(run)[1])
    assert words[-2:] == ["--to", "q4_k_m"]
    monkeypatch.setattr(sys, "argv", [*words[:-1], "merged", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    made = json.loads(capsys.readouterr().out)["figures"]["made"]
    assert Path(made["merged"]["path"]).parent == run.folder / "export"
    assert "held-out rows" in finish_html(run)
    assert (run.folder / "report.html").is_file()


def test_every_export_is_offered_with_its_size(run: Run) -> None:
    found = {offer.name: offer for offer in offers(run)}
    assert list(found) == ["adapter", *NAMES]
    assert set(NAMES) == (set(KINDS) - {"gguf"}) | set(QUANTISATIONS)
    sizes = [found[name].size_bytes or 0 for name in ("f16", "q8_0", "q4_k_m")]
    assert sizes == sorted(sizes, reverse=True)
    assert found["adapter"].command.startswith("strixft chat")
    box = ExportBox(run)
    assert "q8_0" in box.buttons


def test_a_run_that_is_not_evaluated_has_no_verdict(tiny_run: Run) -> None:
    assert sentences(tiny_run) == []
    assert "is not evaluated yet" in finish_html(tiny_run)


def test_links_are_those_of_a_widget_or_of_an_output(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A widget's address is the browser's; an output's is JupyterLab's, from its folder."""
    served = {"base_url": "/base/", "root_dir": str(run.folder.parent)}
    monkeypatch.setattr("jupyter_server.serverapp.list_running_servers", lambda: [served])
    assert 'href="/base/files/my%20run/report.html"' in finish_html(run)
    assert 'href="/my%20run/report.html"' in finish_html(run, in_widget=False)
    monkeypatch.setattr("jupyter_server.serverapp.list_running_servers", list)
    assert "href" not in finish_html(run)
