"""Torch in a child process: for real on this machine, and children that crash, hang or babble."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import GOOD
from torch import Tensor

from strixft.doctor import probe_child
from strixft.doctor.checks import CHECKS, examine
from strixft.doctor.host import HostView, run_probe
from strixft.support.child import Figures, Probe

BEGIN = (
    "import json, sys; f = open(sys.argv[-1], 'a');"
    "say = lambda row: print(json.dumps(row), file=f, flush=True);"
)
"""A child that writes rows to the file it is given."""


def _child(code: str, limit_s: float = 60.0) -> Probe:
    return run_probe(limit_s, [sys.executable, "-c", BEGIN + code])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the child has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def real() -> Probe:
    """Results of torch on this machine."""
    return run_probe()


def test_every_step_works_here(real: Probe) -> None:
    assert real.ended == "done", real
    assert tuple(real.steps) == tuple(probe_child.STEPS)
    assert [step for step in real.steps if real.problem(step) is not None] == []
    assert real.steps["import"]["version"] == torch.__version__
    assert 0.05 < real.steps["nf4"]["relative_error"] < 0.12
    assert len(real.steps["attention"]["errors"]) == len(probe_child.HEAD_SIZES)
    first, *_, last = real.steps["step"]["losses"]
    assert last < first


def test_all_torch_checks_say_something_here(real: Probe) -> None:
    checks = [check for check in CHECKS if check.needs_torch]
    findings = examine(HostView(probe=lambda: real), checks).findings
    assert [finding.check for finding in findings if finding.status == "fail"] == []
    assert {finding.check for finding in findings} == {check.name for check in checks}
    assert len(checks) == len(probe_child.STEPS), "a step without a check"
    assert not [finding for finding in findings if "not reached" in finding.saw]


def test_a_crash_keeps_what_was_found_out() -> None:
    probe = _child(
        "say({'begin': 'import'}); say({'step': 'import', 'figures': {'version': '9'}});"
        "say({'begin': 'nf4'}); import os; print('torn wings', file=sys.stderr);"
        "sys.stderr.flush(); os.abort()"
    )
    assert (probe.ended, probe.at) == ("crashed", "nf4")
    assert probe.steps == {"import": {"version": "9"}}
    assert probe.how == "SIGABRT: torn wings"
    assert probe.problem("import") is None
    assert probe.problem("nf4") == "crashed (SIGABRT: torn wings)"


def test_a_torch_that_crashes_on_import() -> None:
    probe = _child("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert (probe.ended, probe.at, probe.how) == ("crashed", "import", "SIGSEGV")


def test_a_torch_that_cannot_be_imported() -> None:
    probe = _child("raise ImportError('libtorch_hip.so: cannot open shared object file')")
    assert (probe.ended, probe.at) == ("crashed", "import")
    assert "cannot open shared object file" in probe.how


def test_a_hang_ends_after_its_time() -> None:
    probe = _child("say({'begin': 'import'}); import time; time.sleep(600)", limit_s=1.0)
    assert (probe.ended, probe.at) == ("timed out", "import")


def test_a_line_cut_short_is_left_out() -> None:
    probe = _child("f.write('{\"step\": \"imp'); f.flush(); print('noise')")
    assert probe.ended == "done"
    assert probe.steps == {}


def test_steps_not_reached_are_unknown_and_not_ok(tmp_path: Path) -> None:
    host = next(host for host in GOOD if host.name == "fedora")
    steps = {"import": {"version": "9", "device": "cuda", "arch": "gfx1151"}}
    probe = Probe(ended="crashed", at="nf4", how="SIGSEGV", steps=steps)
    view = HostView(root=tmp_path, probe=lambda: probe)
    host._write(tmp_path)
    checks = [check for check in CHECKS if check.needs_torch]
    status = {finding.check: finding.status for finding in examine(view, checks).findings}
    assert status["nf4"] == "fail"
    assert status["training-step"] == status["attention"] == "unknown"


# the steps themselves find a fault when there is one


def test_garbage_from_nf4_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def shuffled(packed: Tensor, state: object) -> Tensor:
        return torch.randn(512, 512)

    monkeypatch.setattr("bitsandbytes.functional.dequantize_4bit", shuffled)
    problem = probe_child.STEPS["nf4"]()["problem"]
    assert problem.startswith("error 1.4")
    assert re.search(r"; 9\d\.\d% of them are not the code that is due$", problem)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_wrong_attention_is_found(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    right = torch.nn.functional.scaled_dot_product_attention

    def wrong(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        result = right(query, *rest, **options)
        return result * value if query.shape[-1] == 72 else result

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", wrong)
    assert probe_child.check_attention()["problem"].endswith("head size 72")


def test_a_wrong_head_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return (hidden @ weight.T).sum()

    monkeypatch.setattr("strixft.step.loss.chunked_cross_entropy", plain_sum)
    assert probe_child.check_head()["problem"].startswith("gradients are off by")


def test_a_step_that_raises_is_noted_and_the_next_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken() -> Figures:
        raise RuntimeError("invalid device function")

    def missing() -> Figures:
        raise ModuleNotFoundError("No module named 'trl'", name="trl")

    work = {"nf4": broken, "head": missing, "import": probe_child.describe_build}
    monkeypatch.setattr(probe_child, "STEPS", work)
    probe_child.main(tmp_path / "steps")
    rows = [json.loads(line) for line in (tmp_path / "steps").read_text().splitlines()]
    figures = {row["step"]: row["figures"] for row in rows if "step" in row}
    assert figures["nf4"]["problem"] == "RuntimeError: invalid device function"
    assert figures["head"]["skipped"] == "trl is not installed"
    assert figures["import"]["version"] == torch.__version__
