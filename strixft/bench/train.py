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
from strixft.bench.kernels import DEFAULT_MODEL, product_columns
from strixft.bench.roofline import FLOP_PER_TOKEN
from strixft.bench.run import Bench, BenchRow
from strixft.bench.timing import columns, seconds_of
from strixft.catalog.hosts import Budget, Host
from strixft.catalog.models import MODELS
from strixft.data.batches import Batch, PackedRows, collate, on_device, pack, training_order
from strixft.guard.host import budget_for, cap, find_host
from strixft.model.architecture import multiplied_parameters
from strixft.model.load import random_model
from strixft.plan.choose import DataShape, Planner
from strixft.plan.dry_run import DryRun
from strixft.probe.job import Job
from strixft.recipe.schema import Dataset, Recipe
from strixft.recipe.schema import Train as TrainSection
from strixft.step.memory_tracker import peak_memory, release_memory
from strixft.step.update import TrainingStep

LAYERS = {"cuda": 0, "cpu": 2}

LENGTH = {"cuda": 2048, "cpu": 128}

TOKENS = {"cuda": 65_536, "cpu": 512}

SQUARE = {"cuda": 8192, "cpu": 1024}

WARM = 3
"""Updates that are not counted: they compile, and make the optimiser's state."""

GB = 1e9


def bench_job(
    model: str, method: str, length: int, host: Host, *, layers: int = 0, **train: Any
) -> Job:
    """Return a job without data: its rows are made here.

    Args:
        model: Model that planning knows.
        method: Training method.
        length: Tokens of a packed row.
        host: Host of the job.
        layers: Layers of the model; 0 means all of them.
        **train: Settings of the recipe's section `train`.
    """
    from transformers import AutoConfig

    recipe = Recipe(
        model=model,
        method=method,
        dataset=Dataset(source="none", max_length=length),
        train=TrainSection.model_validate(train),
    )
    config = MODELS[model].text_config | ({"num_hidden_layers": layers} if layers else {})
    return Job.of(recipe, AutoConfig.for_model(**config), host)


class Train(Bench):
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

    def measure(self) -> list[BenchRow]:
        """Time the training step by the plan's choice, and by plans near it."""
        host = find_host("auto")
        device = host.device
        job = bench_job(
            DEFAULT_MODEL[device] if self.model == "auto" else self.model,
            self.method,
            self.length or LENGTH[device],
            host,
            layers=self.layers or LAYERS[device],
            tokens_per_update=self.tokens or TOKENS[device],
            micro_batch=self.rows or "auto",
            recompute=int(self.recompute) if self.recompute.isdecimal() else self.recompute,
            attention=self.attention,
            compile=self.compile,
        )
        limit = Budget(int(self.budget_gb * GB), "--budget-gb")
        limit = limit if self.budget_gb else budget_for(job.recipe.memory, host)
        return Trial(job, limit, self.updates).rows(self.neighbours)


class Trial:
    """One job, and plans of it to be timed one after the other.

    Args:
        job: What is trained.
        limit: Memory that plans may use.
        updates: Timed updates of each plan.
    """

    def __init__(self, job: Job, limit: Budget, updates: int) -> None:
        self.job, self.limit, self.updates = job, limit, updates
        length, tokens = job.recipe.dataset.max_length, int(job.recipe.train.tokens_per_update)
        most = tokens * 4 // 3 + length  # rounding to whole micro-batches adds up to a third
        self.chats = _chats((updates + WARM + 2) * most, length, job.config.vocab_size)
        self.data = DataShape.of_packed(length, self.chats)

    def plans(self, num_neighbours: int) -> list[DryRun]:
        """Return the plan's choice, then the plans near it that are predicted to be fastest."""
        planner = Planner(self.job, self.data)
        choice = planner.choose(self.limit).run
        near = set(self._near(planner, choice) if num_neighbours else ())
        near -= {(choice.shape.rows, choice.recomputed_layers)}
        runs = [planner.dry_run(*plan) for plan in near]
        fitting = [run for run in runs if planner.need_bytes(run) <= self.limit.num_bytes]
        fitting.sort(key=lambda run: (run.seconds_per_update or 0.0) / (run.steps * run.shape.rows))
        return [choice, *fitting[:num_neighbours]]

    def _near(self, planner: Planner, choice: DryRun) -> Iterator[tuple[int, int]]:
        """Yield other rows with the fewest recomputed layers that fit; more layers, and fewer."""
        rows, layers = choice.shape.rows, choice.recomputed_layers
        for other in planner.rows():
            # `fewest_recomputed` asks for allocated bytes; the allocator's rounding counts here
            fewest = planner.fewest_recomputed(other, self.limit).recomputed_layers
            for count in planner.layers():
                run = planner.dry_run(other, count) if count >= fewest else None
                if run and planner.need_bytes(run) <= self.limit.num_bytes:
                    yield other, count
                    break
        for step in (max(1, planner.num_layers * share // 80) for share in (1, 3, 10)):
            yield from ((rows, n) for n in (layers + step, layers - step) if n in planner.layers())

    def planned_tok_per_s(self, run: DryRun) -> float | None:
        """Return the predicted rate of real tokens, or None where no time is predicted."""
        tokens = run.steps * run.shape.rows * self.data.mean_length()
        return tokens / run.seconds_per_update if run.seconds_per_update else None

    def rows(self, num_neighbours: int) -> list[BenchRow]:
        """Return plans as predicted and as measured."""
        job, runs = self.job, self.plans(num_neighbours)
        device = job.host.device
        cap(self.limit.num_bytes, max(run.reserved_bytes for run in runs))
        name = str(job.dtype).removeprefix("torch.")
        product = product_columns((SQUARE[device],) * 3, "forward", device, name, repeat=5)
        model = random_model(job.recipe, job.config, device, job.dtype)
        return [self._row(model, run, product["tflop_per_s"]) for run in runs]

    def _row(self, model: Any, run: DryRun, tflop_per_s: float) -> BenchRow:
        release_memory()  # what was measured before must not count
        recipe, options = self.job.recipe, self.job.options_with(run.recomputed_layers)
        step = TrainingStep(model, recipe.train, options)
        timed = self._timed(step, run)
        trains_all = all(parameter.requires_grad for parameter in step.model.parameters())
        read = multiplied_parameters(self.job.config)
        flop = read * FLOP_PER_TOKEN["full" if trains_all else "adapter"]
        return {
            "model": recipe.model,
            "method": recipe.method,
            "rows×tokens": f"{run.shape.rows}×{run.shape.length}",
            "micro_batches": run.steps,
            "attention": options.attention,
            "compiled": options.compiled,
            "recomputed_layers": options.recomputed_layers,
            **timed,
            "planned_tok_per_s": self.planned_tok_per_s(run),
            "planned_peak_gb": run.peak_bytes / GB,
            "planned_reserved_gb": run.reserved_bytes / GB,
            "product_tflop_per_s": tflop_per_s,
            "share_of_product_rate": timed["tok_per_s"] * flop / 1e12 / tflop_per_s,
        }

    def _timed(self, step: TrainingStep, run: DryRun) -> BenchRow:
        """Warm up, then time updates one after the other."""
        updates, device = self._batches(run), self.job.host.device
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
        allocated, reserved = memory["peak_bytes"], memory["reserved_bytes"]
        return {
            "tok_per_s": sum(tokens) / sum(seconds),
            "spread": columns("", rates)["spread"],
            "s_per_update": statistics.median(seconds),
            "last_loss": float(losses[-1]),
            "first_update_s": first_s,
            "fill": sum(tokens) / places,
            "peak_gb": allocated and allocated / GB,
            "reserved_gb": reserved and reserved / GB,
        }

    def _batches(self, run: DryRun) -> Iterator[list[Batch]]:
        """Yield the batches of one update after the other, on the device."""
        shape, size = run.shape.packed, run.shape.rows
        assert shape is not None
        order = training_order(self.data.trained, len(self.chats), 0, size)
        batches = (order[start : start + size] for start in range(0, len(order), size))
        placed = (
            on_device(collate(self.chats.take(rows), shape), self.job.host.device)
            for rows in batches
        )
        while True:
            yield [next(placed) for _ in range(run.steps)]


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
