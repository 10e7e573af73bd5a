"""The training step on this device: real tokens a second, memory, and both beside the plan.

Weights are random and made on the device: speed and memory do not depend on their values.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from strixft.bench import data
from strixft.bench.gemm import product
from strixft.bench.result import Row
from strixft.bench.timing import Sample, seconds_of, time_work
from strixft.catalog.hosts import Budget, Host
from strixft.catalog.models import MODELS
from strixft.data.batches import Batch, PackedShape, collate, on_device
from strixft.data.pack import PackedRows, pack, training_order
from strixft.guard.cap import cap
from strixft.guard.host import budget_for, find_host
from strixft.model.load import random_model
from strixft.plan.choose import Choice, Planner
from strixft.plan.data_shape import DataShape
from strixft.plan.dry_run import DryRun
from strixft.probe.job import Job
from strixft.recipe.schema import Dataset, Recipe, Train
from strixft.step.tracker import peak_memory, release_memory
from strixft.step.update import TrainingStep

MODEL = {"cuda": "meta-llama/Llama-3.1-8B-Instruct", "cpu": "meta-llama/Llama-3.2-1B-Instruct"}

LAYERS = {"cuda": 0, "cpu": 2}

LENGTH = {"cuda": 2048, "cpu": 128}

SQUARE = {"cuda": 8192, "cpu": 1024}

WARM = 3
"""Updates that are not counted: they compile, and make the optimiser's state."""

GB = 1e9


def bench_config(model: str, layers: int = 0) -> Any:
    """Of a model that planning knows; 0 layers are all of them."""
    from transformers import AutoConfig

    config = MODELS[model].sides
    return AutoConfig.for_model(**config | ({"num_hidden_layers": layers} if layers else {}))


def _chats(num_tokens: int, length: int, vocabulary: int) -> PackedRows:
    """Packed chats whose lengths are as those of chats, and whose words are drawn alike."""
    from datasets import Dataset as Rows

    rng, drawn = random.Random(0), np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        lengths.append(data.lengths_of_chats(rng, length))
    rows = Rows.from_dict(
        {
            "input_ids": [drawn.integers(0, vocabulary, size) for size in lengths],
            "trained": [[False] + [True] * (size - 1) for size in lengths],
            "length": lengths,
            "num_trained": [size - 1 for size in lengths],
        }
    )
    return PackedRows(rows, pack(lengths, length))


def bench_recipe(model: str, method: str, length: int, **train: Any) -> Recipe:
    """A recipe without data: its rows are made here."""
    return Recipe(
        model=model,
        method=method,
        dataset=Dataset(source="none", max_length=length),
        train=Train.model_validate(train),
    )


def _updates(
    rows: PackedRows, run: DryRun, order: list[int], shape: PackedShape, device: str
) -> Iterator[list[Batch]]:
    """Batches of one update after the other, on the device."""
    size, steps = run.shape.rows, run.steps
    batches = (order[start : start + size] for start in range(0, len(order), size))
    made = (collate(rows.take(numbers), shape) for numbers in batches)
    placed = (on_device(batch, device) for batch in made)
    while True:
        yield [next(placed) for _ in range(steps)]


def _linear_weights(model: Any) -> int:
    """Weights of the linear layers of the base and of the head: 2 FLOP a token each."""
    from strixft.model.adapter import base_of

    config = base_of(model).config
    hidden, head_size = config.hidden_size, getattr(config, "head_dim", None)
    head_size = head_size or hidden // config.num_attention_heads
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    layer = hidden * (heads * head_size + 3 * config.intermediate_size)
    return int(config.num_hidden_layers * layer + config.vocab_size * hidden)


def _product_flop_per_s(device: str, dtype: str) -> float:
    size = SQUARE[device]
    times = time_work(product((size,) * 3, "forward", device, dtype), device, repeat=5)
    return float(2.0 * size**3 / times["ours"].median)


@dataclass(frozen=True, slots=True)
class _Timed:
    """Updates one after the other."""

    seconds: list[float]
    tokens: list[int]
    last_loss: float

    def figures(self) -> dict[str, Any]:
        """Speed, and how much it varies."""
        rates = [count / spent for count, spent in zip(self.tokens, self.seconds, strict=True)]
        return {
            "tok_per_s": sum(self.tokens) / sum(self.seconds),
            "spread": Sample(tuple(rates)).spread,
            "s_per_update": statistics.median(self.seconds),
            "last_loss": self.last_loss,
        }


def _timed(step: TrainingStep, updates: Iterator[list[Batch]], count: int, device: str) -> _Timed:
    seconds, tokens, losses = list[float](), list[int](), list[Any]()
    for _ in range(count):
        batches = next(updates)
        seconds.append(seconds_of(lambda: losses.append(step.update(batches)), 1, device))  # noqa: B023
        tokens.append(sum(batch["num_tokens"] for batch in batches))
    return _Timed(seconds, tokens, float(losses[-1]))


def _row(
    step: TrainingStep, run: DryRun, figures: dict[str, Any], flop_per_s: float
) -> dict[str, Any]:
    options = step.options
    rate = figures["tok_per_s"]
    per_token = (4 if not _trains_all(step) else 6) * _linear_weights(step.model)
    return {
        "rows×tokens": f"{run.shape.rows}×{run.shape.length}",
        "micro_batches": run.steps,
        "attention": options.attention,
        "compiled": options.compiled,
        "recomputed_layers": options.recomputed_layers,
        **figures,
        "planned_peak_gb": run.peak_bytes / GB,
        "planned_reserved_gb": run.reserved_bytes / GB,
        "product_tflop_per_s": flop_per_s / 1e12,
        "share_of_product_rate": rate * per_token / flop_per_s,
    }


def _trains_all(step: TrainingStep) -> bool:
    return all(parameter.requires_grad for parameter in step.model.parameters())


def bench_train(
    model: str = "auto",
    method: str = "qlora",
    budget_gb: float = 0.0,
    rows: int = 0,
    length: int = 0,
    recompute: str = "auto",
    attention: str = "auto",
    compile: str = "auto",  # noqa: A002
    tokens: int = 0,
    updates: int = 15,
    layers: int = 0,
    neighbours: int = 0,
) -> list[Row]:
    """Time the training step as the plan would run it, on random weights and packed chats.

    Args:
        model: One that planning knows; auto is Llama 3.1 8B, on a CPU two layers of 3.2 1B.
        method: qlora, lora, full, …
        budget_gb: What the process may use, in 10⁹ bytes; 0 is what the host has.
        rows: Packed rows of a micro-batch; 0 is the plan's choice.
        length: Tokens of a packed row; 0 is 2048, on a CPU 128.
        recompute: Layers computed again: a number, none, elementwise, all, or auto.
        attention: A way to compute attention, or auto.
        compile: layers, none or auto.
        tokens: Trained tokens of an update; 0 is 65,536, on a CPU 512.
        updates: Timed updates; three more come before them.
        layers: Layers of the model; 0 is all of them, on a CPU two.
        neighbours: Plans near the choice to time as well: is it the fastest here too?
    """
    host = find_host("auto")
    device = host.device
    name, length = MODEL[device] if model == "auto" else model, length or LENGTH[device]
    tokens = tokens or (65_536 if device == "cuda" else 512)
    recipe = bench_recipe(
        name,
        method,
        length,
        tokens_per_update=tokens,
        micro_batch=rows or "auto",
        recompute=int(recompute) if recompute.isdecimal() else recompute,
        attention=attention,
        compile=compile,
    )
    limit = Budget(int(budget_gb * GB), "--budget-gb")
    limit = limit if budget_gb else budget_for(recipe.memory, host)
    config = bench_config(name, layers or LAYERS[device])
    return TrainBench(recipe, config, host, limit, updates).rows(neighbours)


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
        """The plan's choice, then its neighbours."""
        planner = Planner(self.job, self.data)
        choice = planner.choose(self.limit)
        return [choice.run, *neighbours(planner, choice, self.limit, num_neighbours)]

    def planned_tok_per_s(self, run: DryRun) -> float | None:
        """Real tokens; None where no time is predicted."""
        tokens = run.steps * run.shape.rows * self.data.mean_length()
        return tokens / run.seconds_per_update if run.seconds_per_update else None

    def rows(self, num_neighbours: int) -> list[Row]:
        """Plans as predicted and as measured."""
        device, runs = self.host.device, self.plans(num_neighbours)
        cap(self.limit.num_bytes, max(run.reserved_bytes for run in runs))
        dtype = self.job.dtype
        flop_per_s = _product_flop_per_s(device, str(dtype).removeprefix("torch."))
        model = random_model(self.recipe, self.config, device, dtype)
        return [self._row(model, run, flop_per_s) for run in runs]

    def _row(self, model: Any, run: DryRun, flop_per_s: float) -> Row:
        release_memory()  # what was measured before is not to count
        options = self.job.options_with(run.recomputed_layers)
        step = TrainingStep(model, self.recipe.train, options)
        figures = self._timed(step, run)
        figures["planned_tok_per_s"] = self.planned_tok_per_s(run)
        found = _row(step, run, figures, flop_per_s)
        return {"model": self.recipe.model, "method": self.recipe.method} | found

    def _timed(self, step: TrainingStep, run: DryRun) -> dict[str, Any]:
        device, chats, shape = self.host.device, self.chats, run.shape.packed
        assert shape is not None
        order = training_order(self.data.trained, len(chats), 0, run.shape.rows)
        batches = _updates(chats, run, order, shape, device)
        with peak_memory(step.model) as memory:
            first = _timed(step, batches, 1, device)
            _timed(step, batches, WARM - 1, device)
            timed = _timed(step, batches, self.updates, device)
        places = self.updates * run.steps * run.shape.rows * run.shape.length
        return {
            **timed.figures(),
            "first_update_s": first.seconds[0],
            "fill": sum(timed.tokens) / places,
            "peak_gb": _gb(memory["peak_bytes"]),
            "reserved_gb": _gb(memory["reserved_bytes"]),
        }


def _gb(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else num_bytes / GB


Plan = tuple[int, int]
"""Rows of a micro-batch, recomputed layers."""


def _fewest_that_fit(planner: Planner, rows: int, limit: Budget) -> Plan:
    """By the allocator's rules too; the most layers, if none fit."""
    few = planner.fewest_recomputed(rows, limit).recomputed_layers
    more = [layers for layers in planner.layers() if layers >= few]
    fitting = (n for n in more if planner.need_bytes(planner.dry_run(rows, n)) <= limit.num_bytes)
    return rows, next(fitting, more[-1])


def _near(planner: Planner, chosen: Plan, limit: Budget) -> Iterator[Plan]:
    """Other numbers of rows with the fewest layers; the same rows with more and fewer layers."""
    rows, layers = chosen
    yield from (_fewest_that_fit(planner, n, limit) for n in planner.rows() if n != rows)
    for step in (max(1, planner.num_layers * share // 80) for share in (1, 3, 10)):
        yield from ((rows, n) for n in (layers + step, layers - step) if n in planner.layers())


def neighbours(planner: Planner, choice: Choice, limit: Budget, count: int) -> list[DryRun]:
    """So many plans that fit, of those near the choice the ones predicted to be fastest.

    Args:
        planner: What made the choice.
        choice: The plan to look around.
        limit: What they may use.
        count: How many; fewer come where fewer fit.
    """
    chosen = choice.run.shape.rows, choice.run.recomputed_layers
    plans = set(_near(planner, chosen, limit) if count else ()) - {chosen}
    runs = (planner.dry_run(*plan) for plan in plans)
    fitting = [run for run in runs if planner.need_bytes(run) <= limit.num_bytes]
    return sorted(fitting, key=_seconds_per_row)[:count]


def _seconds_per_row(run: DryRun) -> float:
    return (run.seconds_per_update or 0.0) / (run.steps * run.shape.rows)
