"""The page on benchmarks says what the table and the code say."""

import re

from conftest import REPOSITORY

from strixft.bench.published import FIRST_GUIDE, figures, first_guide, reached_shares
from strixft.bench.run import BENCHES

PAGE = (REPOSITORY / "docs" / "benchmarks.md").read_text(encoding="utf-8")
HOSTS = {"v100-32": "V100", "strix-halo-128": "Strix Halo", "dgx-spark": "Spark"}
MODELS = {"DeepSeek R1 70B": "R1 70B"}
WORDS = {"too_low": "too low", "does_not_fit": "does not fit"}


def test_every_cell_of_the_first_guide_stands_with_its_ceiling_and_verdict() -> None:
    for cell in first_guide():
        name = f"| {MODELS.get(cell.model, cell.model)}, {HOSTS[cell.host]}"
        (row,) = [line for line in PAGE.splitlines() if line.startswith(name)]
        assert cell.verdict is not None
        assert WORDS.get(cell.verdict, cell.verdict) in row
        if cell.value is None:
            continue
        assert f"{cell.value:g}" in row.replace("12.10", "12.1")
        assert cell.ceiling is not None
        stated = re.search(r"= ([\d.]+)", row) or re.search(r"([\d.]+) \|", row)
        assert stated is not None
        assert abs(float(stated[1]) / cell.ceiling.tok_per_s - 1) < 0.02


def test_what_a_claim_would_need_is_right() -> None:
    for cell in first_guide():
        if cell.verdict != "impossible" or cell.value is None:
            continue
        assert cell.ceiling is not None
        needed = cell.value * cell.ceiling.per_token / 1e9
        assert any(
            abs(int(number) - needed) < 1 for number in re.findall(r"needs (\d+) GB/s", PAGE)
        )


def test_the_vendors_rates_need_what_the_page_says() -> None:
    for row in figures():
        if (row.figure, row.mark) != ("train_tok_per_s", "vendor"):
            continue
        assert row.value is not None
        assert row.ceiling is not None
        assert f"{row.value:,.0f}" in PAGE
        needed = row.value * row.ceiling.per_token / 1e12
        assert any(abs(int(number) - needed) < 3 for number in re.findall(r"= (\d+) TFLOP/s", PAGE))


def test_shares_that_dense_models_reach_are_those_of_the_table() -> None:
    text = re.sub(r"\s+", " ", PAGE)
    for host in HOSTS:
        shares = reached_shares(host, sparse=False)
        assert f"{shares[0]:.2f}–{shares[-1]:.2f}" in text


def test_every_bench_is_named() -> None:
    for name in (*BENCHES, "published"):
        assert f"strixft bench {name}" in PAGE or f"bench_{name}" in PAGE or name == "data"
    assert FIRST_GUIDE.startswith("first guide")


def test_the_page_claims_no_test_on_the_machine() -> None:
    assert "Nothing on this page was run on a Strix Halo by this project" in re.sub(
        r"\s+", " ", PAGE
    )
    assert "No measured time of Z-Image-Turbo on gfx1151 was found published" in PAGE
