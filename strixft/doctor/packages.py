"""torch, ROCm and bitsandbytes as installed, read from their metadata: nothing is imported."""

from __future__ import annotations

import re
from collections.abc import Iterator

from strixft.catalog.hosts import AMD_VENDOR
from strixft.catalog.methods import BITSANDBYTES
from strixft.doctor.devices import NVIDIA_VENDOR
from strixft.doctor.finding import Finding, Fix
from strixft.doctor.kernel import AMD_DOC
from strixft.doctor.view import HostView

ROCM_INDEX = "https://repo.amd.com/rocm/whl/gfx1151/"

ROCM_TORCH = "torch==2.11.0+rocm7.13.0"
"""The exact local version: without it pip takes the newer CUDA build."""

WHEELS = "ROCm/TheRock: RELEASES.md; amd/playbooks (vendor)"

BNB_SOURCE = "bitsandbytes-foundation/bitsandbytes PR #1885; wheels unpacked (tested)"


Version = tuple[int, ...]

HIP_OF_ROCM = {10: (7, 16)}
"""Where the two differ (shootthesound/Fizgig PR #103)."""

GOOD_ROCM = (((7, 2, 1), (7, 3)), ((7, 11), (8,)))
"""Half-open ranges that work with the kernels of the floor; 7.9 and 7.10 do not."""


def rocm_torch(view: HostView) -> Fix:
    """How to get the right torch."""
    return Fix(
        "install AMD's build for this GPU",
        (f'pip install --force-reinstall --index-url {ROCM_INDEX} "{ROCM_TORCH}"',),
        "start Python, or the notebook's kernel, again",
    )


def _built_with(view: HostView, name: str) -> str | None:
    """What torch's `version.py` says of `hip`, `rocm` or `cuda`: "" for None, None if nothing."""
    text = view.read(view.package_folder / "torch" / "version.py") or ""
    found = re.search(rf"^{name}\b[^=\n]*=\s*(?:None|['\"](.+)['\"])", text, re.MULTILINE)
    return (found[1] or "") if found else None


def torch_build(view: HostView) -> str | None:
    """`rocm`, `cpu` or `cuda`; None where torch is not installed.

    The index's name is the local part of the version. PyPI's build for CUDA has none, nor have
    those of distributions or one's own (`2.9.0a0+git7bcbafe`, unslothai/unsloth PR #4053), so
    `version.py` is asked too.
    """
    version = view.package_version("torch")
    if version is None:
        return None
    local = version.partition("+")[2]
    if "rocm" in local or _built_with(view, "hip"):
        return "rocm"
    return "cpu" if "cpu" in local or _built_with(view, "cuda") == "" else "cuda"


def has_rocm_torch(view: HostView) -> bool:
    """The installed torch is a ROCm build."""
    return torch_build(view) == "rocm"


def rocm_version(view: HostView) -> Version | None:
    """ROCm version that torch was built with, from its local version or its `version.py`.

    `2.11.0+rocm7.13.0` is (7, 13, 0); `2.9.1+rocm7.2.1.lw.git7e1940d4` is (7, 2, 1). A torch
    without `rocm` in `version.py` is older than ROCm 10, so HIP's 7.2.53211 is some ROCm 7.2.
    """
    local = (view.package_version("torch") or "").partition("+")[2]
    named = f"{local} rocm{_built_with(view, 'rocm')}"
    found = re.search(r"rocm(?:sdk)?(\d+)\.(\d+)(?:\.(\d+))?", named)
    found = found or re.match(r"(\d+)\.(\d+)", _built_with(view, "hip") or "")
    return tuple(int(part) for part in found.groups() if part) if found else None


def hip_version(view: HostView) -> Version | None:
    """HIP version of torch, by which bitsandbytes chooses its library: ROCm 10 has HIP 7.16."""
    found = re.match(r"(\d+)\.(\d+)", _built_with(view, "hip") or "")
    if found:
        return int(found[1]), int(found[2])
    rocm = rocm_version(view)
    return HIP_OF_ROCM.get(rocm[0], rocm[:2]) if rocm else None


def needed_build(view: HostView) -> str:
    """The build for this machine: `rocm`, `cuda` or `cpu`."""
    if view.strix_halo is not None:
        return "rocm"
    return "cuda" if NVIDIA_VENDOR in view.vendors else "cpu"


def check_torch_build(view: HostView) -> Iterator[Finding]:
    """The build against the machine."""
    version, build = view.package_version("torch"), torch_build(view)
    if build is None:
        yield Finding(
            status="unknown",
            saw=f"torch is not installed in {view.prefix}",
            why="what torch, ROCm and bitsandbytes do here could not be checked",
            fix=Fix("install the environment", ("make setup",)),
            source=WHEELS,
        )
        return
    needed = needed_build(view)
    saw = f"torch {version}, a build for {build.upper()}"
    if needed == build:
        why = "the build for this machine"
        yield Finding(status="ok", saw=saw, why=why, source=WHEELS)
    elif needed == "cpu":
        yield _without_known_gpu(view, saw)
    elif needed == "rocm":
        why = "it cannot see an AMD GPU: it came from the wrong index"
        yield Finding(status="fail", saw=saw, why=why, fix=rocm_torch(view), source=WHEELS)
    else:
        yield Finding(
            status="fail",
            saw=saw,
            why="it cannot see an NVIDIA GPU",
            fix=Fix("install a CUDA build", ("make setup TORCH=cuda",)),
            source="https://pytorch.org/get-started/locally/",
        )


def _without_known_gpu(view: HostView, saw: str) -> Finding:
    other_amd = AMD_VENDOR in view.vendors and not has_rocm_torch(view)
    return Finding(
        status="ok",
        saw=saw,
        why="if ROCm supports this AMD GPU, its own build of torch uses it"
        if other_amd
        else "it runs on the CPU here",
        fix=Fix("choose the ROCm build", ("https://pytorch.org/get-started/locally/",))
        if other_amd
        else None,
        source=WHEELS,
    )


def _in_ranges(version: Version) -> bool:
    known = version if len(version) > 2 else (*version, 1)  # "rocm7.2": some 7.2
    return any(low <= known < high for low, high in GOOD_ROCM)


def _shown(version: Version) -> str:
    return ".".join(map(str, version))


def check_rocm(view: HostView) -> Iterator[Finding]:
    """The ROCm version of the torch build against the kernels that work."""
    if view.strix_halo is None or not has_rocm_torch(view):
        return
    version = rocm_version(view)
    if version is None:
        yield Finding(
            status="unknown",
            saw=f"torch {view.package_version('torch')} names no ROCm version",
            why="7.2.1–7.2.4 and 7.11–7.14 work with the kernels of the floor",
            fix=Fix("ask torch", ('python -c "import torch; print(torch.version.hip)"',)),
            source=AMD_DOC,
        )
    elif _in_ranges(version):
        yield Finding(
            status="ok", saw=f"ROCm {_shown(version)}", why="works with this kernel", source=AMD_DOC
        )
    else:
        new = version >= (8,)
        yield Finding(
            status="warn" if new else "fail",
            saw=f"ROCm {_shown(version)}",
            why="no training report on gfx1151 with it was found"
            if new
            else "6.4, 7.1, 7.9 and 7.10 do not work with the kernels that this GPU needs",
            fix=rocm_torch(view),
            source=AMD_DOC,
        )


def library_versions(view: HostView) -> list[Version]:
    """ROCm versions that the installed bitsandbytes has a library for.

    `libbitsandbytes_rocm72.so` is (7, 2), `…_rocm714.so` is (7, 14).
    """
    folder = view.package_folder / "bitsandbytes"
    names = [path.stem for path in folder.glob("libbitsandbytes_rocm*.so")]
    digits = [name.rpartition("rocm")[2].replace(".", "") for name in names]
    return sorted((int(d[0]), int(d[1:])) for d in digits if d.isdigit() and len(d) > 1)


def check_bitsandbytes(view: HostView) -> Iterator[Finding]:
    """Its version, and a library for the ROCm major of torch."""
    version = view.package_version("bitsandbytes")
    install = Fix("install a version with the fix", (f'pip install "{BITSANDBYTES}"',))
    if version is None:
        why = "4-bit training (qlora) needs it; lora and full do not"
        saw = "bitsandbytes is not installed"
        yield Finding(status="unknown", saw=saw, why=why, fix=install, source=BNB_SOURCE)
        return
    if has_rocm_torch(view):
        yield from _bitsandbytes_on_rocm(view, version, install)
    else:
        yield Finding(
            status="ok", saw=f"bitsandbytes {version}", why="4-bit training", source=BNB_SOURCE
        )


def _bitsandbytes_on_rocm(view: HostView, version: str, install: Fix) -> Iterator[Finding]:
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < (0, 50):
        yield Finding(
            status="fail",
            saw=f"bitsandbytes {version} with a ROCm build of torch",
            why="its wave size is wrong for this GPU: NF4 with block size 64, the default, gives"
            " garbage, block size 32 crashes",
            fix=install,
            source=BNB_SOURCE,
        )
        return
    hip, libraries = hip_version(view), library_versions(view)
    if hip is None or not libraries:
        yield Finding(
            status="unknown",
            saw=f"bitsandbytes {version}; its ROCm libraries could not be listed",
            why="without one for torch's ROCm major nothing in 4 bit works",
            fix=Fix("look at what it loads", ("python -m bitsandbytes",)),
            source=BNB_SOURCE,
        )
        return
    usable = [row for row in libraries if row[0] == hip[0] and row <= hip]
    yield _library(view, version, hip, usable[-1]) if usable else _no_library(view, version, hip)


def _library(view: HostView, version: str, hip: Version, used: Version) -> Finding:
    saw = f"bitsandbytes {version}: its library for ROCm {_shown(used)} serves HIP {_shown(hip)}"
    rocm = rocm_version(view)
    if rocm is None or rocm[0] == hip[0] or used == hip:
        why = "it takes the nearest lower library of the same major"
        return Finding(status="ok", saw=saw, why=why, source=BNB_SOURCE)
    return Finding(
        status="warn",
        saw=f"{saw}, which is ROCm {_shown(rocm)}'s",
        why="unproved on this GPU: the library is loaded with a warning, and no report of 4-bit"
        " training with it was found; the NF4 round trip decides",
        fix=Fix("look at check nf4: where it is ok, 4-bit weights are right here"),
        source="bitsandbytes 0.50.2: cextension.py, cuda_specs.py; shootthesound/Fizgig PR #103",
    )


def _no_library(view: HostView, version: str, hip: Version) -> Finding:
    return Finding(
        status="fail",
        saw=f"bitsandbytes {version} has no library for HIP {_shown(hip)}",
        why="qlora and 8-bit optimisers raise 'not found': wheels up to 0.50.2 stop at HIP 7",
        fix=rocm_torch(view),
        source=f"{BNB_SOURCE}; patientx-cfz/comfyui-rocm#113",
    )
