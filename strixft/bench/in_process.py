"""A model in this process as a backend: base, with its adapter, merged. T: prompt tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from strixft.bench.backends import Backend, Generation
from strixft.bench.roofline import CACHE_BYTES
from strixft.bench.timing import synchronize
from strixft.catalog.hosts import Host, budget
from strixft.catalog.methods import METHODS
from strixft.guard.host import cap, device_type, find_host
from strixft.model.adapter import base_of, load_adapter
from strixft.model.load import load_base, native_dtype, shape_base
from strixft.model.source import load_config
from strixft.recipe.load import check_recipe
from strixft.recipe.schema import Recipe
from strixft.run.open import find_run
from strixft.support.errors import FitError, StageError
from strixft.support.units import format_gib
from strixft.train.stage import ADAPTER, Trained


@dataclass(frozen=True, kw_only=True)
class Loaded(Backend):
    """A model on this device."""

    host: Host
    load_s: float

    @classmethod
    def of(cls, model: Any, name: str, variant: str, host: Host, load_s: float) -> Self:
        """Count what a model reads for one token.

        Args:
            model: On the device.
            name: Hub id, folder or embedded model.
            variant: `base`, `adapter` or `merged`.
            host: This machine.
            load_s: Seconds that loading took.
        """
        config, read = model.config.get_text_config(), list(_read(model))
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        size = CACHE_BYTES if host.device == "cuda" else 4
        cache = size * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
        return cls(
            model=model,
            label={"backend": "transformers", "model": name, "variant": variant, "server": None},
            host=host,
            load_s=load_s,
            read_parameters=sum(count for count, _ in read),
            read_bytes=sum(num_bytes for _, num_bytes in read),
            cache_bytes_per_position=cache,
        )

    def prompt(self, tokens: int, seed: int) -> Tensor:
        """Return random tokens, (1, T), like llama-bench."""
        generator = torch.Generator().manual_seed(seed)
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = torch.randint(0, vocabulary, (1, max(1, tokens)), generator=generator)
        return ids.to(self.model.device)

    @torch.no_grad()
    def generate(self, prompt_tokens: int, new_tokens: int, seed: int) -> Generation:
        """Read random tokens, then choose the likeliest token again and again."""
        ids, device = self.prompt(prompt_tokens, seed), self.host.device
        synchronize(device)
        start = time.perf_counter()
        token, cache = read_prompt(self.model, ids)
        synchronize(device)
        first = time.perf_counter()
        decode(self.model, token, cache, new_tokens - 1)
        synchronize(device)
        last = time.perf_counter()
        return Generation(
            load_s=self.load_s,
            prompt_tokens=ids.shape[1],
            prompt_s=first - start,
            tokens=new_tokens,
            decoded=new_tokens - 1,
            decode_s=last - first,
            total_s=last - start,
            first_token_s=first - start,
            clock="client",
        )


def read_prompt(model: Any, ids: Tensor) -> tuple[Tensor, Any]:
    """Return the first token, (1, 1), and the cache after the prompt `ids`, (1, T)."""
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1:].argmax(-1), out.past_key_values


def decode(model: Any, token: Tensor, cache: Any, count: int) -> Tensor:
    """Return the token after `count` more, (1, 1)."""
    for _ in range(count):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return token


@torch.no_grad()
def bare_seconds(model: Any, ids: Tensor, new_tokens: int) -> float:
    """Time an answer by torch and transformers alone, with one clock around it, for `--check`.

    Args:
        model: A causal language model.
        ids: Prompt, (1, T).
        new_tokens: Tokens of the answer.
    """
    synchronize(ids.device.type)
    start = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    for _ in range(new_tokens - 1):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    synchronize(ids.device.type)
    return time.perf_counter() - start


def _read(model: Any) -> Iterator[tuple[float, float]]:
    """Yield count and bytes of each parameter read for one token."""
    base = base_of(model)
    config, head = base.config.get_text_config(), base.get_output_embeddings().weight
    table = base.get_input_embeddings().weight
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    for name, parameter in model.named_parameters():
        if parameter is table and parameter is not head:
            continue  # words are only looked up in it
        active = config.num_experts_per_tok / experts if experts and ".experts." in name else 1.0
        state = getattr(parameter, "quant_state", None)
        count = math.prod(state.shape) if state else parameter.numel()
        yield count * active, parameter.numel() * parameter.element_size() * active


def _load(recipe: Recipe, host: Host) -> tuple[nn.Module, float]:
    """Load a base and return the seconds it took; refuse weights that do not fit before that."""
    device = device_type()
    dtype = native_dtype(device, bfloat16=host.bfloat16)
    shapes = shape_base(load_config(recipe), METHODS[recipe.method], dtype)
    size = sum(p.numel() * p.element_size() for p in shapes.parameters())
    limit = budget(host, recipe.memory.reserve_gib if host.device == "cuda" else 0)
    if size > limit.num_bytes:
        raise FitError(
            f"{recipe.model} needs {format_gib(size)} for its weights and {host.name} has"
            f" {format_gib(limit.num_bytes)}: {limit.source}",
            fix="--method qlora for weights in 4 bit, or a smaller model",
        )
    cap(limit.num_bytes, size)
    start = time.perf_counter()
    model = load_base(recipe, device, dtype).eval()
    synchronize(device)
    return model, time.perf_counter() - start


def load_model(name: str, method: str) -> Iterator[Loaded]:
    """Yield one model without an adapter.

    Args:
        name: Hub id, folder or embedded model.
        method: Training method, as which its weights are stored.
    """
    settings = {"model": name, "method": method, "dataset": {"source": "-"}}
    host = find_host("auto")
    model, load_s = _load(check_recipe(settings, name="bench"), host)
    yield Loaded.of(model, name, "base", host, load_s)


def load_run(run_name: str) -> Iterator[Loaded]:
    """Yield the base of a run, then the base with its adapter, then the merged model.

    Raises:
        StageError: The run has no adapter.
    """
    run = find_run(run_name)
    folder = run.stage_folder(Trained.name) / ADAPTER
    if METHODS[run.recipe.method].adapter == "none" or not folder.is_dir():
        raise StageError(
            f"run {run.name} has no adapter in {folder}",
            fix=f"{run.resume_command} --to train, or --model with a folder",
        )
    host, name = find_host("auto"), run.recipe.model
    model, load_s = _load(run.recipe, host)
    yield Loaded.of(model, name, "base", host, load_s)
    adapted: Any = load_adapter(model, folder).eval()
    yield Loaded.of(adapted, name, "adapter", host, load_s)
    yield Loaded.of(adapted.merge_and_unload().eval(), name, "merged", host, load_s)
