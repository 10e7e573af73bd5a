"""Runs beside each other."""

from pathlib import Path

from conftest import WriteRecipe
from test_train import trained

from strixft.app.compare import Comparison
from strixft.run.open import open_run


def test_only_what_differs_is_listed(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    first = open_run(write_recipe(), tmp_path / "first")
    second = open_run(write_recipe(), tmp_path / "second", {"train.learning_rate": 1e-3})
    trained(first)
    compared = Comparison([first, second])
    assert compared.differences() == [["train.learning_rate", "0.002", "0.001"]]
    results = {row[0]: row[1:] for row in compared.results()}
    assert results["loss, last update"][0] != "–"
    assert results["loss, last update"][1] == "–"
    assert compared.to_dict()["differences"]["train.learning_rate"]["second"] == "0.001"
    assert "training losses of the runs" in compared._repr_html_()
