"""The training step on this device: real tokens per second and memory, both beside the plan.

Weights are random and made on the device: speed and memory do not depend on their values.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import Field

from strixft.bench.data import lengths_of_chats
from strixft.bench.gemm import DEFAULT_MODEL, product
from strixft.bench.result import BenchRow, Options
from strixft.bench.timing import Sample, seconds_of, time_work
from strixft.catalog.hosts import Budget, Host
from strixft.catalog.models import MODELS
from strixft.data.batches import Batch, collate, on_device
from strixft.data.pack import PackedRows, pack, training_order
from strixft.guard.cap import cap
from strixft.guard.host import budget_for, find_host
from strixft.model.adapter import base_of
from strixft.model.load import random_model
from strixft.plan.choose import Choice, Planner
from strixft.plan.data_shape import DataShape
from strixft.plan.dry_run import DryRun
from strixft.probe.job import Job
from strixft.recipe.schema import Dataset, Recipe, Train
from strixft.step.tracker import peak_memory, release_memory
from strixft.step.update import TrainingStep

LAYERS = {"cuda": 0, "cpu": 2}

LENGTH = {"cuda": 2048, "cpu": 128}

TOKENS = {"cuda": 65_536, "cpu": 512}

SQUARE = {"cuda": 8192, "cpu": 1024}

WARM = 3
"""Updates that are not counted: they compile, and make the optimiser's state."""

GB = 1e9


class TrainOptions(Options):
    """Time the training step as the plan would run it, on random weights and packed chats."""

    model: str = Field(
        "auto",
        description="Model that planning knows; auto is Llama 3.1 8B, on a CPU two layers of"
        " Llama 3.2 1B.",
    )
    method: str = Field("qlora", description="Training method: qlora, lora, full, …")
    budget_gb: float = Field(
        0.0, ge=0, description="Memory for the process, in 10⁹ bytes; 0 means what the host has."
    )
    rows: int = Field(
        0, ge=0, description="Packed rows of a micro-batch; 0 means the plan's choice."
    )
    length: int = Field(0, ge=0, description="Tokens of a packed row; 0 means 2048, on a CPU 128.")
    recompute: str = Field(
        "auto", description="Recomputed layers: a number, none, elementwise, all, or auto."
    )
    attention: str = Field("auto", description="An attention backend, or auto.")
    compile: str = Field("auto", description="layers, none or auto.")
    tokens: int = Field(
        0, ge=0, description="Trained tokens of an update; 0 means 65,536, on a CPU 512."
    )
    updates: int = Field(15, ge=1, description="Timed updates; three more come before them.")
    layers: int = Field(
        0, ge=0, description="Layers of the model; 0 means all of them, on a CPU two."
    )
    neighbours: int = Field(
        0, ge=0, description="Plans near the choice to time as well: is it the fastest here too?"
    )


def bench_config(model: str, layers: int = 0) -> Any:
    """Return the configuration of a model that planning knows; 0 layers means all of them."""
    from transformers import AutoConfig

    config = MODELS[model].text_config
    return AutoConfig.for_model(**config | ({"num_hidden_layers": layers} if layers else {}))


def bench_recipe(model: str, method: str, length: int, **train: Any) -> Recipe:
    """Return a recipe without data: its rows are made here."""
    return Recipe(
        model=model,
        method=method,
        dataset=Dataset(source="none", max_length=length),
        train=Train.model_validate(train),
    )


def bench_train(options: TrainOptions) -> list[BenchRow]:
    """Time the training step by the plan's choice, and by plans near it."""
    host = find_host("auto")
    device = host.device
    recompute = options.recompute
    recipe = bench_recipe(
        DEFAULT_MODEL[device] if options.model == "auto" else options.model,
        options.method,
        options.length or LENGTH[device],
        tokens_per_update=options.tokens or TOKENS[device],
        micro_batch=options.rows or "auto",
        recompute=int(recompute) if recompute.isdecimal() else recompute,
        attention=options.attention,
        compile=options.compile,
    )
    limit = Budget(int(options.budget_gb * GB), "--budget-gb")
    limit = limit if options.budget_gb else budget_for(recipe.memory, host)
    config = bench_config(recipe.model, options.layers or LAYERS[device])
    return TrainBench(recipe, config, host, limit, options.updates).rows(options.neighbours)


class TrainBench:
    """One model on this device, and plans of its training to be timed one after the other."""

    def __init__(
        self, recipe: Recipe, config: Any, host: Host, limit: Budget, updates: int
    ) -> None:
        self.recipe, self.config, self.host, self.limit = recipe, config, host, limit
        self.job = Job.of(recipe, config, host)
        self.updates = updates
        length, tokens = recipe.dataset.max_length, int(recipe.train.tokens_per_update)
        most = tokens * 4 // 3 + length  # rounding to whole micro-batches adds up to a third
        self.chats = _chats((updates + WARM + 2) * most, length, config.vocab_size)
        self.data = DataShape.of_packed(length, self.chats)

    def plans(self, num_neighbours: int) -> list[DryRun]:
        """Return the plan's choice, then its neighbours."""
        planner = Planner(self.job, self.data)
        choice = planner.choose(self.limit)
        return [choice.run, *neighbours(planner, choice, self.limit, num_neighbours)]

    def planned_tok_per_s(self, run: DryRun) -> float | None:
        """Return the predicted rate of real tokens, or None where no time is predicted."""
        tokens = run.steps * run.shape.rows * self.data.mean_length()
        return tokens / run.seconds_per_update if run.seconds_per_update else None

    def rows(self, num_neighbours: int) -> list[BenchRow]:
        """Return plans as predicted and as measured."""
        device, runs = self.host.device, self.plans(num_neighbours)
        cap(self.limit.num_bytes, max(run.reserved_bytes for run in runs))
        dtype = self.job.dtype
        size, name = SQUARE[device], str(dtype).removeprefix("torch.")
        times = time_work(product((size,) * 3, "forward", device, name), device, repeat=5)
        flop_per_s = 2.0 * size**3 / times["ours"].median
        model = random_model(self.recipe, self.config, device, dtype)
        return [self._row(model, run, flop_per_s) for run in runs]

    def _row(self, model: Any, run: DryRun, flop_per_s: float) -> BenchRow:
        release_memory()  # what was measured before must not count
        options = self.job.options_with(run.recomputed_layers)
        step = TrainingStep(model, self.recipe.train, options)
        timed = self._timed(step, run)
        trains_all = all(parameter.requires_grad for parameter in step.model.parameters())
        flop_per_token = (6 if trains_all else 4) * _linear_weights(step.model)
        return {
            "model": self.recipe.model,
            "method": self.recipe.method,
            "rows×tokens": f"{run.shape.rows}×{run.shape.length}",
            "micro_batches": run.steps,
            "attention": options.attention,
            "compiled": options.compiled,
            "recomputed_layers": options.recomputed_layers,
            **timed,
            "planned_tok_per_s": self.planned_tok_per_s(run),
            "planned_peak_gb": run.peak_bytes / GB,
            "planned_reserved_gb": run.reserved_bytes / GB,
            "product_tflop_per_s": flop_per_s / 1e12,
            "share_of_product_rate": timed["tok_per_s"] * flop_per_token / flop_per_s,
        }

    def _timed(self, step: TrainingStep, run: DryRun) -> BenchRow:
        """Warm up, then time updates one after the other."""
        updates, device = self._batches(run), self.host.device
        seconds, tokens, losses = list[float](), list[int](), list[Any]()
        with peak_memory(step.model) as memory:
            for _ in range(WARM + self.updates):
                batches = next(updates)
                took = seconds_of(lambda: losses.append(step.update(batches)), 1, device)  # noqa: B023
                seconds.append(took)
                tokens.append(sum(batch["num_tokens"] for batch in batches))
        first_s, seconds, tokens = seconds[0], seconds[WARM:], tokens[WARM:]
        rates = [count / spent for count, spent in zip(tokens, seconds, strict=True)]
        places = self.updates * run.steps * run.shape.rows * run.shape.length
        return {
            "tok_per_s": sum(tokens) / sum(seconds),
            "spread": Sample(tuple(rates)).spread,
            "s_per_update": statistics.median(seconds),
            "last_loss": float(losses[-1]),
            "first_update_s": first_s,
            "fill": sum(tokens) / places,
            "peak_gb": _gb(memory["peak_bytes"]),
            "reserved_gb": _gb(memory["reserved_bytes"]),
        }

    def _batches(self, run: DryRun) -> Iterator[list[Batch]]:
        """Yield the batches of one update after the other, on the device."""
        shape, size = run.shape.packed, run.shape.rows
        assert shape is not None
        order = training_order(self.data.trained, len(self.chats), 0, size)
        batches = (order[start : start + size] for start in range(0, len(order), size))
        placed = (
            on_device(collate(self.chats.take(rows), shape), self.host.device) for rows in batches
        )
        while True:
            yield [next(placed) for _ in range(run.steps)]


def _gb(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else num_bytes / GB


def _chats(num_tokens: int, length: int, vocabulary: int) -> PackedRows:
    """Make packed chats with lengths like those of real chats and random tokens."""
    from datasets import Dataset as Rows

    rng, drawn = random.Random(0), np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        lengths.append(lengths_of_chats(rng, length))
    rows = Rows.from_dict(
        {
            "input_ids": [drawn.integers(0, vocabulary, size) for size in lengths],
            "trained": [[False] + [True] * (size - 1) for size in lengths],
            "length": lengths,
            "num_trained": [size - 1 for size in lengths],
        }
    )
    return PackedRows(rows, pack(lengths, length))


def _linear_weights(model: Any) -> int:
    """Count the weights of the base's linear layers and head: 2 FLOP a token each."""
    config = base_of(model).config
    hidden, head_size = config.hidden_size, getattr(config, "head_dim", None)
    head_size = head_size or hidden // config.num_attention_heads
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    layer = hidden * (heads * head_size + 3 * config.intermediate_size)
    return int(config.num_hidden_layers * layer + config.vocab_size * hidden)


# Plans near the choice.

Plan = tuple[int, int]
"""Rows of a micro-batch, recomputed layers."""


def _near(planner: Planner, chosen: Plan, limit: Budget) -> Iterator[Plan]:
    """Yield other numbers of rows with the fewest layers that fit, and more and fewer layers."""
    rows, layers = chosen
    for other in planner.rows():
        if other != rows:
            fewest = planner.fewest_recomputed(other, limit).recomputed_layers
            counts = [count for count in planner.layers() if count >= fewest]
            # `fewest_recomputed` asks for allocated bytes; the allocator's rounding counts here.
            runs = ((n, planner.dry_run(other, n)) for n in counts)
            fitting = (n for n, run in runs if planner.need_bytes(run) <= limit.num_bytes)
            yield other, next(fitting, counts[-1])
    for step in (max(1, planner.num_layers * share // 80) for share in (1, 3, 10)):
        yield from ((rows, n) for n in (layers + step, layers - step) if n in planner.layers())


def neighbours(planner: Planner, choice: Choice, limit: Budget, count: int) -> list[DryRun]:
    """Return the plans near a choice that fit and are predicted to be fastest.

    Args:
        planner: Planner that made the choice.
        choice: Plan to look around.
        limit: Memory that plans may use.
        count: Most plans to return.
    """
    chosen = choice.run.shape.rows, choice.run.recomputed_layers
    plans = set(_near(planner, chosen, limit) if count else ()) - {chosen}
    runs = (planner.dry_run(*plan) for plan in plans)
    fitting = [run for run in runs if planner.need_bytes(run) <= limit.num_bytes]
    fitting.sort(key=lambda run: (run.seconds_per_update or 0.0) / (run.steps * run.shape.rows))
    return fitting[:count]
