"""The report: one page, whole, and nothing in it that the data could break."""

from pathlib import Path

import pytest
from conftest import WriteRecipe, chat, chats
from test_train import trained

from strixft.app.report import write_report
from strixft.evaluate.stage import evaluate_recipe
from strixft.run.folder import Run
from strixft.run.open import open_run
from strixft.support.errors import HostError

HOSTILE = "<script>alert(1)</script>"


def test_the_report_of_a_new_run_says_that_nothing_is_done(tiny_run: Run) -> None:
    html = write_report(tiny_run).read_text()
    assert html.count("Not done yet.") == 4
    assert "Not evaluated yet." in html


def test_the_report_shows_every_stage_and_stands_alone(tiny_run: Run) -> None:
    trained(tiny_run)
    evaluate_recipe(tiny_run)
    html = write_report(tiny_run).read_text()
    for text in (
        "exact_match",
        "memory at the peak by part",
        "losses by update",
        "held-out rows: loss",
        "tokens_per_update",
    ):
        assert text in html
    assert "http" not in html.replace("https://docs", "")
    assert 'src="data:image/png;base64,' in html
    assert "Not done yet." not in html


def test_a_report_that_cannot_be_written_says_where(tiny_run: Run) -> None:
    path = tiny_run.folder / "report.html"
    path.mkdir()
    with pytest.raises(HostError) as caught:
        write_report(tiny_run)
    assert caught.value.problem == f"{path} cannot be written: Is a directory"
    assert caught.value.fix == (
        f"ls -ld {tiny_run.folder} {path}   shows what is there, and whose it is"
    )


def test_text_of_the_data_is_escaped(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    rows = [*chats(10), *(chat(f"{HOSTILE} {n}", HOSTILE) for n in range(10))]
    run = open_run(write_recipe(rows=rows, dataset={"validation_fraction": 0.5}), tmp_path / "run")
    trained(run)
    evaluate_recipe(run)
    html = write_report(run).read_text()
    assert HOSTILE not in html
    assert "&lt;script&gt;" in html
