"""Doctor finds every recorded fault, names it first, and stays silent on good hosts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, WriteRecipe
from recorded import FAULTY, GOOD, RECORDED, Recorded, _resolved

from strixft.doctor.checks import CHECKS, check_host, examine, fix_script
from strixft.doctor.finding import STATUSES, Check, Diagnosis, Finding, Fix
from strixft.doctor.host import HostView
from strixft.doctor.packages import torch_build
from strixft.recipe.load import load_recipe
from strixft.support.units import GIB


def _named(hosts: list[Recorded]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("host", hosts, ids=lambda host: host.name)


def _shown(finding: Finding) -> str:
    return f"{finding.status} {finding.check}: {finding.saw} | {finding.fix and finding.fix.text}"


Diagnose = Callable[[Recorded], Diagnosis]


@pytest.fixture(scope="module")
def diagnose(tmp_path_factory: pytest.TempPathFactory) -> Diagnose:
    """Examine a recorded host, once for all tests."""
    known: dict[str, Diagnosis] = {}

    def examined(host: Recorded) -> Diagnosis:
        if host.name not in known:
            known[host.name] = examine(host.view(tmp_path_factory.mktemp("host")))
        return known[host.name]

    return examined


def test_there_are_enough_recorded_hosts() -> None:
    assert len(GOOD) >= 7
    assert len(FAULTY) >= 40
    assert len({host.name for host in RECORDED}) == len(RECORDED)


@_named(GOOD)
def test_no_false_alarm_on_a_good_host(host: Recorded, diagnose: Diagnose) -> None:
    diagnosis = diagnose(host)
    assert [_shown(finding) for finding in diagnosis.to_fix] == []
    assert diagnosis.exit_code == 0


@_named(FAULTY)
def test_the_fault_is_found_and_named_first(host: Recorded, diagnose: Diagnose) -> None:
    assert host.expect is not None
    diagnosis = diagnose(host)
    assert diagnosis.to_fix, "nothing was found"
    first = diagnosis.to_fix[0]
    assert (first.check, first.status) == (host.expect["check"], host.expect["status"]), _shown(
        first
    )
    for part in host.expect["types"]:
        assert first.fix is not None
        assert part in first.fix.text
    allowed = {first.check, *host.expect.get("also", ())}
    assert {finding.check for finding in diagnosis.to_fix} <= allowed
    assert diagnosis.exit_code == (host.expect["status"] == "fail")


def test_every_finding_that_is_not_ok_has_fix_and_source(diagnose: Diagnose) -> None:
    seen = [finding for host in RECORDED for finding in diagnose(host).findings]
    to_fix = [finding for finding in seen if finding.status != "ok"]
    assert len(to_fix) >= len(FAULTY)
    assert all(finding.source and finding.why and finding.saw for finding in seen)
    assert [_shown(f) for f in to_fix if f.fix is None or not f.fix.say] == []
    assert [_shown(f) for f in seen if "the check stopped" in f.saw] == []
    complained = {finding.check for finding in to_fix}
    assert complained == {check.name for check in CHECKS} - {"board", "kernels"}


def test_a_check_that_stops_does_not_hide_the_others(tmp_path: Path) -> None:
    def stop(view: HostView) -> list[Finding]:
        raise ZeroDivisionError("impossible")

    view = GOOD[0].view(tmp_path)
    diagnosis = examine(view, [Check("broken", stop), *CHECKS[:2]])
    assert [finding.check for finding in diagnosis.findings] == [
        "broken",
        "platform",
        "distribution",
    ]
    assert diagnosis.findings[0].status == "unknown"


def test_the_worst_comes_first(diagnose: Diagnose) -> None:
    host = next(host for host in FAULTY if host.name == "os-release-without-version")
    ranks = [STATUSES.index(finding.status) for finding in diagnose(host).findings]
    assert ranks == sorted(ranks)


def test_cuda_through_wsl_is_no_fault(tmp_path: Path) -> None:
    data = _resolved("wsl")
    data["files"] |= {"/usr/lib/wsl/lib/libcuda.so.1": ""}
    assert not [f for f in examine(Recorded("w", data).view(tmp_path)).to_fix if f.status == "fail"]


def test_gttsize_goes_from_modprobe_d(tmp_path: Path) -> None:
    host = next(host for host in FAULTY if host.name == "gttsize-in-modprobe-d")
    fix = examine(host.view(tmp_path)).to_fix[0].fix
    assert fix is not None
    _run_fix(fix, tmp_path)
    left = (tmp_path / "etc/modprobe.d/amdgpu.conf").read_text()
    assert left == "options amdgpu dc=1\n"


def test_html_escapes_what_the_host_says() -> None:
    fix = Fix("<b>")
    finding = Finding(status="warn", saw="<script>", why="", fix=fix, source="", check="x")
    html = Diagnosis((finding,))._repr_html_()
    assert "<script>" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;" in html


def _with_torch(root: Path, *folders: str) -> None:
    """A Python environment with a ROCm build of torch in each of these folders."""
    for folder in folders:
        file = root / "usr" / folder / "site-packages/torch/version.py"
        file.parent.mkdir(parents=True)
        file.write_text("cuda: Optional[str] = None\nhip: Optional[str] = '7.2.53211'\n")


@pytest.mark.parametrize(
    ("folders", "python", "seen"),
    [
        (("lib64/python3.14",), (3, 14), "rocm"),
        (("lib/python3.14",), (3, 14), "rocm"),
        (("lib/python3.9",), (3, 14), "cuda"),
        (("lib/python3.9", "lib64/python3.14"), (3, 14), "rocm"),
    ],
)
def test_packages_are_those_of_the_interpreter_in_lib_and_lib64(
    folders: tuple[str, ...], python: tuple[int, int], seen: str, tmp_path: Path
) -> None:
    _with_torch(tmp_path, *folders)
    view = replace(
        GOOD[0].view(tmp_path),
        prefix="/usr",
        python=python,
        package_version={"torch": "2.9.0a0+git7bcbafe"}.get,
    )
    assert torch_build(view) == seen


# the fixes themselves

PAGES = "ttm.pages_limit=28573696"


def _run_fix(fix: Fix, root: Path) -> None:
    """The file edits of a fix, on the recorded files; what rebuilds the boot menu is left out."""
    for command in fix.commands:
        if "sed -i" in command or "tee" in command:
            line = re.sub(r"(?<![\w/.])/(etc|boot)/", f"{root}/\\1/", command.replace("sudo ", ""))
            subprocess.run(["sh", "-euc", line], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("name", "file", "quoted"),
    [
        ("ttm-default-ubuntu", "etc/default/grub", True),
        ("ttm-default-limine", "etc/default/limine", True),
        ("ttm-default-sdboot", "etc/sdboot-manage.conf", True),
        ("ttm-default-arch", "boot/loader/entries/arch.conf", False),
        ("ttm-default-arch-uki", "etc/kernel/cmdline", False),
        ("ttm-by-amd-ttm-too-low", "etc/modprobe.d/ttm.conf", False),
    ],
)
def test_the_fix_edits_the_boot_loader(name: str, file: str, quoted: bool, tmp_path: Path) -> None:
    host = next(host for host in FAULTY if host.name == name)
    first = examine(host.view(tmp_path)).to_fix[0]
    assert first.fix is not None
    before = (tmp_path / file).read_text()
    for _ in range(2):  # typing it twice does no harm
        _run_fix(first.fix, tmp_path)
    after = (tmp_path / file).read_text()
    assert after.count("pages_limit") == 1
    assert PAGES.removeprefix("ttm.") in after
    lines = [line for line in after.splitlines() if PAGES in line]
    assert all(line.count('"') == 2 * quoted for line in lines)
    kept = {word for word in before.replace('"', " ").split() if "pages_limit" not in word}
    assert kept <= set(after.replace('"', " ").split())


def test_the_fix_takes_gttsize_away_and_leaves_the_rest(tmp_path: Path) -> None:
    data = _resolved("ubuntu-hwe")
    grub = 'GRUB_CMDLINE_LINUX_DEFAULT="quiet amdgpu.gttsize=126976 splash amdttm.pages_limit=1"'
    data["files"] |= {
        "/etc/default/grub": grub,
        "/proc/cmdline": "quiet amdgpu.gttsize=126976 splash amdttm.pages_limit=1",
    }
    findings = examine(Recorded("two", data).view(tmp_path)).to_fix
    assert [finding.check for finding in findings] == ["memory-parameters"] * 2
    for finding in findings:
        assert finding.fix is not None
        _run_fix(finding.fix, tmp_path)
    words = (tmp_path / "etc/default/grub").read_text().strip().partition("=")[2].strip('"').split()
    assert sorted(words) == ["quiet", "splash", PAGES]


def test_the_fix_adds_debian_backports_once(tmp_path: Path) -> None:
    sources = tmp_path / "etc/apt/sources.list.d/debian.sources"
    host = next(host for host in FAULTY if host.name == "kernel-6.12-debian")
    view = host.view(tmp_path)
    sources.parent.mkdir(parents=True)
    sources.write_text("Types: deb\nSuites: trixie trixie-updates\nComponents: main\n")
    fix = examine(view).to_fix[0].fix
    assert fix is not None
    for _ in range(2):
        _run_fix(fix, tmp_path)
    assert "Suites: trixie trixie-updates trixie-backports\n" in sources.read_text()


@_named([*GOOD[:1], *FAULTY])
def test_the_fix_script_is_shell_and_changes_nothing_by_itself(
    host: Recorded, diagnose: Diagnose, tmp_path: Path
) -> None:
    script = fix_script(diagnose(host))
    path = tmp_path / "fixes.sh"
    path.write_text(script)
    subprocess.run(["sh", "-n", path], check=True)
    assert script.startswith("#!/bin/sh\n# Fixes that strixft doctor proposes")
    assert not re.search(r"^(export|unset) ", script, re.MULTILINE)
    assert not re.search(r"^[^#]*(release-upgrade|full-upgrade|bookworm)", script, re.MULTILINE)


def test_json_has_the_six_keys(diagnose: Diagnose) -> None:
    data = json.loads(json.dumps(diagnose(FAULTY[0]).to_dict()))
    keys = {"check", "status", "saw", "why", "fix", "source"}
    assert all(set(row) == keys for row in data["findings"])
    assert all(isinstance(value, str) for row in data["findings"] for value in row.values())


# with a recipe


def _with_recipe(host: str, write_recipe: WriteRecipe, tmp_path: Path, **sections: Any) -> HostView:
    found = next(row for row in RECORDED if row.name == host)
    recipe = load_recipe(write_recipe(**sections))
    return replace(found.view(tmp_path / "root"), recipe=recipe)


def test_a_recipe_that_trains_every_weight_minds_hipblaslt(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    view = _with_recipe("fedora", write_recipe, tmp_path, method="full")
    environ = {**view.environ, "ROCBLAS_USE_HIPBLASLT": "1"}
    found = [f.saw for f in examine(replace(view, environ=environ)).to_fix]
    assert found == ["ROCBLAS_USE_HIPBLASLT=1"]
    lora = _with_recipe("fedora", write_recipe, tmp_path, method="lora")
    assert not examine(replace(lora, environ=environ)).to_fix


def test_a_model_that_does_not_fit_the_disk_fails(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    model = "meta-llama/Llama-3.3-70B-Instruct"
    view = _with_recipe("fedora", write_recipe, tmp_path, model=model)
    tight = replace(view, free_bytes=lambda path: 100 * GIB)
    [finding] = examine(tight).to_fix
    assert (finding.check, finding.status) == ("disk", "fail")
    assert "140.39 GiB asked for" in finding.saw
    assert not examine(replace(view, free_bytes=lambda path: 150 * GIB)).to_fix


def test_the_recommended_limit_keeps_the_recipes_reserve(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    view = _with_recipe("ttm-default-fedora", write_recipe, tmp_path, memory={"reserve_gib": 32})
    fix = examine(view).to_fix[0].fix
    assert fix is not None
    assert f"ttm.pages_limit={93 * 2**18}" in fix.text


# this machine


def test_every_check_answers_on_this_machine() -> None:
    findings = check_host(torch=False).findings
    assert [_shown(finding) for finding in findings if "the check stopped" in finding.saw] == []
    assert "disk" in {finding.check for finding in findings}


def _strixft(*words: str) -> subprocess.CompletedProcess[str]:
    code = "from strixft.app.cli import main; main()"
    command = [sys.executable, "-c", code, *words]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_command_prints_one_json_document() -> None:
    done = _strixft("doctor", "--no-torch", "--json")
    findings = json.loads(done.stdout)["findings"]
    assert done.returncode == int(any(row["status"] == "fail" for row in findings))


def test_the_command_prints_findings_and_a_script() -> None:
    assert " ok" in _strixft("doctor", "--no-torch").stdout.splitlines()[-1]
    assert _strixft("doctor", "--no-torch", "--fix-script").stdout.startswith("#!/bin/sh")


def test_the_command_refuses_a_recipe_with_a_fix() -> None:
    done = _strixft("doctor", "no-such-recipe")
    assert done.returncode == 2
    assert "fix: " in done.stderr


def test_without_the_torch_checks_torch_is_not_imported() -> None:
    code = (
        "import sys; from strixft.doctor.checks import check_host; check_host(torch=False);"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "[]"
