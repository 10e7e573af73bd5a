"""The roofline: bytes and FLOP that a model needs for one token, and the highest rate they allow.

Everything here is arithmetic on a `config.json`, or on counts that the makers of a model publish.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gguf import GGML_QUANT_SIZES

from strixft.catalog.hosts import Host
from strixft.catalog.models import MODELS
from strixft.support.errors import RecipeError
from strixft.support.tables import Table, did_you_mean

CACHE_BYTES = 2
"""Bytes of a number in the attention cache, in 16 bit."""

BITS: dict[str, float] = {
    **{kind.name: 8 * size / block for kind, (block, size) in GGML_QUANT_SIZES.items()},
    "FP8": 8,
    "INT8": 8,
    "Q4_K_M": 4.82,  # smallest published file: 70B, 42.5 GB
    "Q4_K_XL": 4.82,  # as Q4_K_M
    "NF4": 4.127,  # arXiv:2305.14314, section 3
    "2.4 bit": 2.4,
}
"""Bits of a weight with its scales, by quantisation; llama.cpp's blocks are its package's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Parameters of one model, and bytes of cache that each position adds."""

    name: str
    parameters: float
    read_parameters: float
    """Those used for one token: without inactive experts or an embedding that is only looked up."""
    cache_bytes_per_position: float | None = None
    source: str

    @property
    def sparse(self) -> bool:
        """True for a mixture of experts: far fewer weights are read than there are."""
        return self.read_parameters < self.parameters / 2


def weights_of(name: str, config: Mapping[str, Any], source: str) -> Weights:
    """Count the parameters of a dense or sparse decoder, without norms and biases.

    Args:
        name: The model's usual name.
        config: The numbers of its `config.json`.
        source: Their address.
    """
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    attention = 2 * hidden * head_dim * (config["num_attention_heads"] + kv_heads)
    expert = 3 * hidden * config["intermediate_size"]
    experts, active = config.get("num_local_experts", 1), config.get("num_experts_per_tok", 1)
    head = config["vocab_size"] * hidden
    tied = config.get("tie_word_embeddings", config["model_type"].startswith("gemma"))
    return Weights(
        name=name,
        parameters=layers * (attention + experts * expert) + head * (1 if tied else 2),
        read_parameters=layers * (attention + active * expert) + head,
        cache_bytes_per_position=2 * CACHE_BYTES * layers * kv_heads * head_dim,
        source=source,
    )


SHIPPED = {
    "Gemma 2 27B": "google/gemma-2-27b-it",
    "Gemma 3 1B": "google/gemma-3-1b-it",
    "Gemma 3 4B": "google/gemma-3-4b-it",
    "Gemma 3 12B": "google/gemma-3-12b-it",
    "Gemma 3 27B": "google/gemma-3-27b-it",
    "Qwen3 4B": "Qwen/Qwen3-4B",
    "Qwen3 8B": "Qwen/Qwen3-8B",
    "Qwen3 14B": "Qwen/Qwen3-14B",
    "Qwen3 32B": "Qwen/Qwen3-32B",
    "Llama 3 8B": "meta-llama/Llama-3.1-8B-Instruct",
    "Llama 3.1 8B": "meta-llama/Llama-3.1-8B-Instruct",
    "Llama 3.1 70B": "meta-llama/Llama-3.3-70B-Instruct",
    "Llama 3.3 70B": "meta-llama/Llama-3.3-70B-Instruct",
    "DeepSeek R1 70B": "deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
    "DeepSeek R1 Distill Llama 8B": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "DeepSeek R1 0528 Qwen3 8B": "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
    "Mistral Small 24B": "mistralai/Mistral-Small-24B-Instruct-2501",
    "Devstral Small 2 24B": "mistralai/Mistral-Small-24B-Instruct-2501",
}
"""Usual name → the row of `MODELS` with the same shape."""

_GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts_per_tok": 4,
}


def _gpt_oss(name: str, layers: int, experts: int) -> Weights:
    config = {**_GPT_OSS, "num_hidden_layers": layers, "num_local_experts": experts}
    return weights_of(name, config, f"https://huggingface.co/openai/{name}/blob/main/config.json")


def _counted(name: str, parameters: float, read: float, source: str) -> Weights:
    return Weights(name=name, parameters=parameters, read_parameters=read, source=source)


WEIGHTS: Table[Weights] = Table(
    "model with known weights",
    *(
        weights_of(name, MODELS[row].text_config, MODELS[row].source)
        for name, row in SHIPPED.items()
    ),
    _gpt_oss("gpt-oss-20b", 24, 32),
    _gpt_oss("gpt-oss-120b", 36, 128),
    _counted("Llama 2 7B", 6.74e9, 6.61e9, "its paper; a table of 32000 × 4096 looked up"),
    _counted("DeepSeek R1 14B", 14.77e9, 13.99e9, "Qwen2.5 14B; a table of 152064 × 5120"),
    _counted("Gemma 4 31B", 30.7e9, 30.7e9, "its BF16 file, 57.2 GiB ÷ 2 bytes"),
    _counted("Qwen3.5 27B", 27e9, 27e9, "its name"),
    _counted("Qwen3.6 27B", 27e9, 27e9, "its name"),
    _counted("Qwen3.6 35B-A3B", 35e9, 3e9, "its name"),
    _counted("Llama 3.2 3B", 3.21e9, 3.21e9, "its model card; tied head"),
    _counted("GPT 50.9M", 50.9e6, 50.9e6, "bkpaine1/amdsense: profile_report.md"),
)


def file_bytes(weights: Weights, quantisation: str, file_gb: float | None) -> float:
    """Return the bytes of all weights: the size of the published file, else parameters × bits.

    Raises:
        RecipeError: Neither the size of the file nor the quantisation is known.
    """
    if file_gb is not None:
        return file_gb * 1e9
    name = quantisation.removeprefix("UD-")
    if name not in BITS:
        raise RecipeError(
            f"no size is known for {weights.name} in {quantisation!r}",
            fix=f"give the file's size, or {did_you_mean(name, BITS)}",
        )
    return weights.parameters * BITS[name] / 8


def read_bytes(weights: Weights, quantisation: str, file_gb: float | None = None) -> float:
    """Return the fewest bytes of weights that are read for one token: a share of the file."""
    whole = file_bytes(weights, quantisation, file_gb)
    return whole * weights.read_parameters / weights.parameters


Verdict = Literal["plausible", "impossible", "too_low", "does_not_fit"]

TOO_LOW = 0.15
"""Share of the ceiling below which a figure is doubtful: a wrong setting or a wrong number."""

SLACK = 1.5
"""Factor by which a limit that was only measured may be passed: another program may do better."""

FLOP_PER_TOKEN = {"full": 6, "adapter": 4, "forward": 2}
"""FLOP per parameter: forward 2, gradients of inputs 2, gradients of trained weights 2."""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The highest possible rate, from a machine's limit and the cost of a token."""

    tok_per_s: float
    limit_per_s: float
    """Bytes or FLOP per second of the machine."""
    per_token: float
    """Bytes or FLOP."""
    unit: Literal["GB", "TFLOP"]
    theory: bool = True
    """True if the limit is the chip's own, false if it was measured."""

    def share(self, tok_per_s: float) -> float:
        """Return a rate as a share of the ceiling; above 1 it cannot be true."""
        return tok_per_s / self.tok_per_s

    def arithmetic(self, tok_per_s: float | None) -> str:
        """Write out the division, and the bandwidth or FLOP/s that a rate would need."""
        scale = 1e9 if self.unit == "GB" else 1e12
        text = (
            f"{self.limit_per_s / scale:.4g} {self.unit}/s ÷ {self.per_token / scale:.3g}"
            f" {self.unit} = {self.tok_per_s:,.3g} tokens/s"
        )
        if tok_per_s is None:
            return text
        needed = tok_per_s * self.per_token / scale
        return f"{text}; {tok_per_s:,g} needs {needed:,.4g} {self.unit}/s"


def decode_ceiling(host: Host, bytes_per_token: float) -> Ceiling | None:
    """Return the ceiling of generation, or None if the host's memory is unknown.

    Args:
        host: Its bus counts, else its measured bandwidth.
        bytes_per_token: Weights read, and the cache at the depth in question.
    """
    limit = host.bus_bytes_per_s or host.bandwidth_bytes_per_s
    if limit is None:
        return None
    theory = host.bus_bytes_per_s is not None
    return Ceiling(limit.value / bytes_per_token, limit.value, bytes_per_token, "GB", theory)


def compute_ceiling(host: Host, parameters: float, flop_per_parameter: float) -> Ceiling | None:
    """Return the ceiling of prefill or training, or None if the matrix units are unknown.

    Args:
        host: Its peak counts, else its best measured rate.
        parameters: Parameters used for one token.
        flop_per_parameter: A value of `FLOP_PER_TOKEN`.
    """
    peak, flop = host.peak_flop_per_s, parameters * flop_per_parameter
    rates = [peak] if peak else list(host.matmul_flop_per_s.values())
    if not rates:
        return None
    limit = max(rate.value for rate in rates)
    return Ceiling(limit / flop, limit, flop, "TFLOP", peak is not None)


def judge(tok_per_s: float | None, ceiling: Ceiling, *, fits: bool = True) -> Verdict:
    """Return the verdict on a published or measured rate.

    A low rate is doubtful only where memory sets the limit: the share of a chip's matrix rate that
    prompts and training reach varies too much.

    Args:
        tok_per_s: The rate; None if the model does not run there.
        ceiling: Ceiling of this model on this host.
        fits: All weights fit into the host's memory.
    """
    if tok_per_s is None or not fits:
        return "does_not_fit"
    share = ceiling.share(tok_per_s)
    if share > (1 if ceiling.theory else SLACK):
        return "impossible"
    return "too_low" if share < TOO_LOW and ceiling.unit == "GB" else "plausible"
