"""Work in a child process: what crashes or hangs there is told, and what it had found is kept."""

import json
import sys
import time
from pathlib import Path

import pytest

from strixft.support import child
from strixft.support.child import do_steps, run_steps

BEGIN = (
    "import json, sys; f = open(sys.argv[-1], 'a');"
    "say = lambda row: print(json.dumps(row), file=f, flush=True);"
)


def command(code: str) -> list[str]:
    return [sys.executable, "-c", BEGIN + code]


def test_a_step_has_a_limit_of_its_own() -> None:
    code = (
        "import time; say({'begin': 'quick'}); time.sleep(0.3);"
        "say({'step': 'quick', 'figures': {'n': 1}}); say({'begin': 'slow'}); time.sleep(600)"
    )
    began = time.monotonic()
    probe = run_steps(command(code), step_limit_s=1.0)
    assert time.monotonic() - began < 300
    assert (probe.ended, probe.at, probe.how) == ("timed out", "slow", "1 s")
    assert probe.steps == {"quick": {"n": 1}}


def test_a_child_that_never_begins_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "START_LIMIT_S", 0.5)
    probe = run_steps(command("import time; time.sleep(600)"), step_limit_s=0.1, first="varlen")
    assert (probe.ended, probe.at, probe.how) == ("timed out", "varlen", "0.5 s")


def test_much_that_a_child_writes_does_not_stop_it() -> None:
    code = "say({'begin': 'a'}); print('x' * 10**6, file=sys.stderr); print('y' * 10**6);"
    probe = run_steps(command(code + "say({'step': 'a', 'figures': {}})"), limit_s=60)
    assert (probe.ended, probe.steps) == ("done", {"a": {}})


def test_missing_memory_is_told_from_a_fault(tmp_path: Path) -> None:
    def full() -> child.Figures:
        raise RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB")

    do_steps(tmp_path / "steps", {"a": full})
    figures = json.loads((tmp_path / "steps").read_text().splitlines()[1])["figures"]
    assert figures["out_of_memory"]
    assert figures["problem"] == "RuntimeError: HIP out of memory. Tried to allocate 2.00 GiB"
