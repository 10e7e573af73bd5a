"""MKL's slow path on AMD processors, for real: torch's own MKL, and the `mkl` wheel."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from strixft.doctor.mkl import (
    FUNCTIONS,
    Gemm,
    MklComparison,
    MklLibrary,
    Processor,
    _advice,
    build_hook,
    check_mkl,
    find_mkl,
    measure,
    read_processor,
)
from strixft.support.errors import HostError

HERE = read_processor()
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
GENERAL = "Intel(R) Architecture processors"
AVX512 = "Intel(R) Advanced Vector Extensions 512 (Intel(R) AVX-512)"


@pytest.fixture(scope="module")
def hook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, built once."""
    return build_hook(tmp_path_factory.mktemp("hook"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An environment with the `mkl` wheel; 1 GB, gone afterwards."""
    folder = tmp_path_factory.mktemp("mkl")
    venv.create(folder, with_pip=True)
    words = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "mkl==2026.*"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the mkl wheel cannot be installed here: {done.stderr.strip()[-200:]}")
    yield folder
    shutil.rmtree(folder)


def _check(measured: MklComparison) -> None:
    """Check what holds on any processor, and what holds on AMD's."""
    assert measured.before.checksum == pytest.approx(measured.after.checksum, rel=1e-9)
    assert measured.after.is_fast
    assert measured.before.is_fast != (HERE.vendor == "AuthenticAMD")
    assert measured.before.gflop_per_s > 0


@needs_compiler
def test_the_library_has_the_four_functions(hook: Path) -> None:
    library = ctypes.CDLL(str(hook))
    for name in FUNCTIONS[:2]:
        assert getattr(library, name)() == 1
    for name in FUNCTIONS[2:]:
        function = getattr(library, name)
        function.restype = ctypes.c_void_p
        assert ctypes.CFUNCTYPE(ctypes.c_int)(function())() == 1


@needs_compiler
def test_the_library_is_built_once(hook: Path) -> None:
    before = hook.stat().st_mtime_ns
    assert build_hook(hook.parent) == hook
    assert hook.stat().st_mtime_ns == before


def test_without_a_compiler_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(HostError, match="install gcc"):
        build_hook(tmp_path)


@needs_compiler
def test_the_mkl_wheel_takes_the_fast_path_with_the_library(wheel: Path, hook: Path) -> None:
    [target] = [target for target in find_mkl(wheel) if target.path.startswith(str(wheel))]
    assert target.linked == "dynamic"
    assert target.functions == FUNCTIONS[2:]
    _check(MklComparison(target=target, before=measure(target, None), after=measure(target, hook)))


@needs_compiler
def test_the_mkl_inside_torch_takes_the_fast_path_with_the_library(hook: Path) -> None:
    targets = [t for t in find_mkl() if t.linked == "static in torch"]
    if not targets:
        pytest.skip("this torch has no MKL")
    assert set(targets[0].functions) <= set(FUNCTIONS)
    before, after = measure(targets[0], None), measure(targets[0], hook)
    _check(MklComparison(target=targets[0], before=before, after=after))


@needs_compiler
def test_the_line_to_export_is_printed_where_it_helps(tmp_path: Path) -> None:
    report = check_mkl(folder=tmp_path)
    text = json.dumps(report.to_dict())
    assert report.processor == HERE
    assert json.loads(text)["says"] == report.says
    helps = any(row.helps for row in report.measured)
    assert (report.export is not None) == helps
    if report.export:
        words = ["sh", "-c", f"{report.export}; echo $LD_PRELOAD"]
        environment = {**os.environ, "LD_PRELOAD": ""}
        shown = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
        assert shown.stdout.strip() == str(report.library)


def test_without_mkl_it_says_that_it_does_not_matter(tmp_path: Path) -> None:
    report = check_mkl(prefix=tmp_path, folder=tmp_path)
    if report.measured:
        pytest.skip("oneAPI's MKL is installed on this machine")
    assert "no MKL in this environment" in report.says
    assert report.export is None
    assert list(tmp_path.iterdir()) == []


def test_an_intel_processor_needs_nothing(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "proc/cpuinfo"
    cpuinfo.parent.mkdir()
    cpuinfo.write_text("vendor_id\t: GenuineIntel\nmodel name\t: Xeon\nflags\t\t: avx2 avx512f\n")
    assert read_processor(tmp_path) == Processor("GenuineIntel", "Xeon", True)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libmkl_rt.so.2").write_bytes(b"")
    report = check_mkl(prefix=tmp_path, root=tmp_path, folder=tmp_path / "hook")
    assert "fast path on this processor by itself" in report.says


def test_a_processor_that_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nCPU implementer\t: 0x41\n")
    assert read_processor(tmp_path) == Processor("", "", False)


def _measured(before: Gemm, after: Gemm) -> MklComparison:
    return MklComparison(target=MklLibrary("MKL", "x", "dynamic", ()), before=before, after=after)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (Gemm(GENERAL, 40, 1.0), Gemm(AVX512, 80, 1.0), "It helps: MKL takes the AVX-512 path"),
        (Gemm(GENERAL, 40, 1.0), Gemm(AVX512, 40, 1.0), "is not faster here"),
        (Gemm(GENERAL, 40, 1.0), Gemm(GENERAL, 41, 1.0), "it changes nothing"),
        (Gemm(AVX512, 40, 1.0), Gemm(AVX512, 80, 1.0), "nothing to fix"),
    ],
)
def test_the_advice_follows_from_what_was_measured(before: Gemm, after: Gemm, says: str) -> None:
    assert says in _advice((_measured(before, after),))


def test_another_result_is_no_help() -> None:
    assert not _measured(Gemm(GENERAL, 40, 1.0), Gemm(AVX512, 80, 2.0)).helps


def test_a_library_that_cannot_be_loaded_is_an_error_with_a_fix(tmp_path: Path) -> None:
    target = MklLibrary("MKL", str(tmp_path / "libmkl_rt.so.2"), "dynamic", ())
    with pytest.raises(HostError, match="fix: pip install"):
        measure(target, None)
