"""Our own kernels compile for gfx1151, and keep their values in registers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "dev" / "target_kernels.py"


def test_our_own_kernels_compile_for_the_target(tmp_path: Path) -> None:
    """In a process of its own: the tool tells Triton and inductor that this is the target."""
    pytest.importorskip("triton", reason="pip install triton")
    command = [sys.executable, str(TOOL), "own"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TOOL.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "`" in line]
    assert len({name.split(":")[0] for name, *_ in rows}) == 8
    assert sum(int(count) for _, count, *_ in rows) >= 20
    for name, _, lds, vgprs, spilled, scratch, _, verdict in rows:
        assert (spilled, scratch) == ("0", "0"), name
        assert int(lds.split("–")[-1].replace(",", "")) <= 65_536, name
        assert 0 < int(vgprs.split("–")[-1]) <= 256, name
        assert "compile" not in verdict, name
