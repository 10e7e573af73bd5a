"""After training: planned against real, and both breakdowns where they are apart."""

from typing import Any

import pytest
import torch
from test_train import trained
from torch import nn

from strixft.run.folder import Run
from strixft.support.units import GIB
from strixft.train.compare import REST, breakdowns, compare_html, device_parts, gap, warning

PARTS = {
    "weights": 4 * GIB,
    "adapter": GIB,
    "gradients": GIB,
    "optimizer": 2 * GIB,
    "activations": 6 * GIB,
    "head": GIB,
    "workspace": GIB,
}


def figures(share: float, parts: dict[str, int] | None = None) -> dict[str, Any]:
    """Figures of a training whose peak was this share of the planned one."""
    return {
        "planned_peak_bytes": 16 * GIB,
        "planned_reserved_bytes": 17 * GIB,
        "planned_parts": PARTS,
        "planned_tok_per_s": 100.0,
        "peak_bytes": int(16 * GIB * share),
        "reserved_bytes": None,
        "peak_parts": parts or PARTS,
        "tok_per_s": 80.0,
    }


def test_a_gap_is_real_over_planned() -> None:
    assert gap(103, 100) == pytest.approx(0.03)
    assert gap(None, 100) is None
    assert gap(5, None) is None


@pytest.mark.parametrize("share", [1.0, 1.029, 0.971])
def test_a_small_gap_is_not_flagged(share: float) -> None:
    assert warning(figures(share)) is None
    assert "part at the peak" not in compare_html(figures(share))


@pytest.mark.parametrize(("share", "shown"), [(1.05, "+5.0%"), (0.9, "-10.0%")])
def test_a_gap_above_three_percent_shows_both_breakdowns(share: float, shown: str) -> None:
    assert warning(figures(share)) == f"The measured peak is {shown} off the plan."
    html = compare_html(figures(share))
    assert "<td>activations</td><td>6.00 GiB</td><td>6.00 GiB</td>" in html


def test_speed_stands_beside_the_planned_one() -> None:
    assert "<td>100.0</td><td>80.0</td><td>-20.0%</td>" in compare_html(figures(1.0))


def test_a_gpu_tells_what_stays_and_the_rest() -> None:
    model = nn.Linear(1024, 1024, bias=False).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 1024)).sum().backward()
    optimizer.step()
    size = 4 * 1024 * 1024
    parts = device_parts(model, optimizer, 10 * size)
    assert parts["adapter"] == parts["gradients"] == size
    assert sum(parts.values()) == 10 * size
    html = breakdowns(figures(1.1, {"weights": 4 * GIB, REST: 10 * GIB}))
    assert f"<td>{REST}</td><td>8.00 GiB</td><td>10.00 GiB</td>" in html


def test_a_real_training_is_within_its_plan(tiny_run: Run) -> None:
    _, found = trained(tiny_run)
    assert warning(found.figures) is None
    assert sum(found.figures["peak_parts"].values()) == found.figures["peak_bytes"]
    assert "planned" in found._repr_html_()
