"""Load a synthetic checkpoint in four ways, each in a process of its own, side by side.

python dev/loading.py FOLDER [GIGABYTES] [METHOD]

Weights are those of a Llama with layers of the 8B's shape, random with a fixed seed, in files of
1 GB. Where CPU is the device, the weights stay in memory; what counts there is what is held beyond
them. The page cache is dropped before each way, so the disk is read.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
LAYER_BYTES = 2 * 218_112_000
EMBEDDING_BYTES = 2 * 128256 * 4096
GIB = 2**30
WAYS = ("transformers", "streamed and kept", "from the cache", "streamed")


def write_checkpoint(folder: Path, gigabytes: float) -> None:
    """Layers as many as fit, and the embedding, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = max(1, round((gigabytes * 1e9 - EMBEDDING_BYTES) / LAYER_BYTES))
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, tie_word_embeddings=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size=10**9)


def drop_page_cache(folder: Path) -> None:
    """Flush the files and take them out of the page cache."""
    for path in folder.rglob("*.safetensors"):
        with path.open("r+b") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def kernel_bytes(file: str, name: str) -> int:
    """A row of a file of `/proc` that counts in KiB."""
    rows = dict(line.split(":", 1) for line in Path(file).read_text().splitlines())
    return int(rows[name].split()[0]) * 1024


def resident() -> int:
    """Anonymous resident bytes of this process."""
    return kernel_bytes("/proc/self/status", "RssAnon")


class Peak:
    """Resident memory of this process: largest anonymous and file-backed parts, seen every 5 ms."""

    def __init__(self) -> None:
        self.anonymous = self.of_files = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        self.anonymous = max(self.anonymous, resident())
        self.of_files = max(self.of_files, kernel_bytes("/proc/self/status", "RssFile"))

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._look()

    def stop(self) -> None:
        """Look a last time."""
        self._done.set()
        self._thread.join()


def load(way: str, folder: Path, method: str, device: str) -> dict[str, float]:
    """Load in one way; figures in bytes and seconds."""
    import transformers
    from transformers import AutoModelForCausalLM

    import strixft.model.load as ours
    import strixft.model.weights as cache
    from strixft.catalog.methods import METHODS
    from strixft.recipe.schema import Recipe

    dtype = ours.native_dtype(device, bfloat16=True)
    if way == "streamed":
        cache.LEAST_BYTES = 2**60
    warm(device)
    before = resident()
    peak, began = Peak(), time.monotonic()
    if way == "transformers":
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=ours.quantization_of(METHODS[method], dtype),
            device_map={"": device},
            attn_implementation="sdpa",
        )
    else:
        recipe = Recipe.model_validate(
            {"model": str(folder), "method": method, "dataset": {"source": "none"}}
        )
        model = ours.load_base(recipe, device, dtype)
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.monotonic() - began
    peak.stop()
    held = weights_bytes(model)
    figures = {
        "seconds": seconds,
        "anonymous": peak.anonymous - before,
        "of_files": peak.of_files,
        "weights": held,
        "excess": peak.anonymous - before - (held if device == "cpu" else 0),
        "version": transformers.__version__,
    }
    if device != "cpu":
        figures["device_peak"] = torch.cuda.max_memory_allocated()
    return figures


def warm(device: str) -> None:
    """Import what loading imports, and start the device."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
    layer.to(device)(torch.ones(1, 64, device=device))


def weights_bytes(model: torch.nn.Module) -> int:
    """Bytes of the tensors of a model, each once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    return sum(tensors.values())


def measure(way: str, folder: Path, method: str, device: str) -> dict[str, float]:
    """Figures of one way, from a process of its own."""
    drop_page_cache(folder.parent)
    words = [sys.executable, __file__, str(folder), "--way", way, method, device]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "STRIXFT_CACHE": str(folder.parent / "cache"),
    }
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found | {"page_cache": cached_bytes(folder.parent)}


def cached_bytes(folder: Path) -> int:
    """What the page cache holds of the files below a folder; `fincore` is part of util-linux."""
    paths = [str(path) for path in folder.rglob("*.safetensors")]
    words = ["fincore", "--bytes", "--noheadings", "--output", "RES", *paths]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return sum(map(int, done.stdout.split()))


def show(way: str, figures: dict[str, float], read_bytes: int) -> None:
    """A line of the table."""
    rate = read_bytes / GIB / figures["seconds"]
    columns = [f"{figures[k] / GIB:6.2f}" for k in ("anonymous", "excess", "of_files")]
    columns.append(f"{figures['page_cache'] / GIB:6.2f}")
    if "device_peak" in figures:
        columns.append(f"{figures['device_peak'] / GIB:6.2f}")
    print(
        f"| {way} | {figures['seconds']:.1f} | {rate:.2f} | {' | '.join(columns)} |",
        flush=True,
    )


def files_bytes(folder: Path) -> int:
    """Size of the safetensors files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def main() -> None:
    """Write the checkpoint if it is not there, and measure."""
    folder = Path(sys.argv[1]).resolve() / "base"
    gigabytes = float(sys.argv[2]) if len(sys.argv) > 2 else 3.0
    method = sys.argv[3] if len(sys.argv) > 3 else "qlora"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not folder.is_dir():
        write_checkpoint(folder, gigabytes)
    options = WAYS if method == "qlora" else ("transformers", "streamed")
    print(f"{files_bytes(folder) / GIB:.2f} GiB, {method}, {device}; memory in GiB")
    head = (
        "| way | seconds | GiB/s | process | beyond weights | mapped files | left in page cache |"
    )
    print(head + (" device |" if device == "cuda" else ""))
    for way in options:
        figures = measure(way, folder, method, device)
        source = folder.parent / "cache" if way == "from the cache" else folder
        show(way, figures, files_bytes(source))


if __name__ == "__main__":
    if "--way" in sys.argv:
        at = sys.argv.index("--way")
        way, method, device = sys.argv[at + 1 : at + 4]
        print(json.dumps(load(way, Path(sys.argv[1]), method, device)))
    else:
        main()
