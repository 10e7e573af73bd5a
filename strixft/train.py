"""Stage `train`: TRL's trainer as the loop, our batches, our step."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig

from strixft import views
from strixft.architecture import architecture_of
from strixft.checkpoints import KEPT, Checkpoints
from strixft.data import Batch, PackedShape, collate, training_order
from strixft.disk import require_room
from strixft.environment import seen_by_torch
from strixft.errors import FitError, StageError
from strixft.guard import (
    Watches,
    cap,
    device_type,
    find_host,
    finite_again,
    less_memory,
    loss_spikes,
    training_host,
)
from strixft.loop import Guard, GuardedTrainer, NotFiniteError
from strixft.memory import is_out_of_memory
from strixft.methods import METHODS
from strixft.model import base_of, build, load_tokenizer, model_source, native_dtype
from strixft.plan import Plan
from strixft.plan.compare import compare_html, device_parts, planned_figures
from strixft.plan.result import read_config
from strixft.prepare import Prepared
from strixft.prepare.vocabulary import require_known_tokens
from strixft.probe.right import fastest_blas, joins_sums, require_attention, require_right
from strixft.progress import progress_bar
from strixft.recipe import Recipe
from strixft.runs import Result, Run, resume_command
from strixft.step import TrainingStep, Ways, peak_memory
from strixft.units import format_gib, format_number, format_seconds
from strixft.weights import fingerprint_base

ADAPTER = "adapter"
"""Folder of the trained weights: a PEFT adapter, or a whole model for `method: full`."""
CHECKPOINTS = "checkpoints"
PACKED_ROW = "packed_row"
"""Column of the numbers of packed rows, in the order of training."""
Collator = Callable[[Sequence[Any]], Batch]


@dataclass(frozen=True, kw_only=True)
class Trained(Result):
    """Losses, speed and memory of the training."""

    name: ClassVar[str] = "train"
    artefacts: ClassVar[tuple[str, ...]] = (f"{ADAPTER}/*",)

    def require_same_base(self, recipe: Recipe) -> dict[str, str]:
        """The files of the base with their hashes, if it is still the one that was trained.

        Raises:
            StageError: It is another one.
        """
        found = fingerprint_base(model_source(recipe.model))
        then = self.inputs.get("base", found)
        changed = sorted(n for n in then.keys() | found.keys() if then.get(n) != found.get(n))
        if changed:
            run = self.folder.parent
            raise StageError(
                f"the adapter was trained on another base model: {', '.join(changed)} of"
                f" {recipe.model} changed since",
                fix=f"bring it back, or: {resume_command(run)} --from train",
            )
        return found

    def _repr_html_(self) -> str:
        figures = self.figures
        shown = {
            "updates": format_number(figures["updates"]),
            "loss, first update": format_number(figures["losses"][0]),
            "loss, last update": format_number(figures["losses"][-1]),
            "time": format_seconds(figures["train_seconds"]),
            "process, resident": format_gib(figures["resident_bytes"]),
        }
        told = "".join(map(views.warning, self._told()))
        return told + views.mapping(shown) + compare_html(figures) + self.loss_curve()

    def _told(self) -> list[str]:
        figures, told = self.figures, list(self.figures["warnings"])
        if figures["spikes"]:
            listed = ", ".join(map(str, figures["spikes"]))
            told.append(f"The loss jumped at these updates, marked below: {listed}.")
        if figures["checkpoints_set_aside"]:
            told.append(f"Torn, so set aside: {'; '.join(figures['checkpoints_set_aside'])}.")
        return told

    def loss_curve(self) -> str:
        """The losses as a picture."""
        figure, axes = views.new_figure()
        losses = self.figures["losses"]
        axes.plot(range(1, len(losses) + 1), losses, color=views.TUNED, linewidth=1.5)
        spikes = self.figures["spikes"]
        axes.plot(spikes, [losses[at - 1] for at in spikes], "v", color=views.INK, markersize=5)
        axes.set_xlabel("update")
        axes.set_ylabel("loss per trained token")
        axes.set_ylim(bottom=0)
        return views.picture(figure, "training loss by update")


class _Trainer(GuardedTrainer):
    """TRL's loop around our step, whose loss is divided by the trained tokens of the update."""

    def __init__(self, step: TrainingStep, **kwargs: Any) -> None:
        masters = {parameter: parameter.data for parameter in step.trainable()}
        super().__init__(model=step.model, optimizers=(step.optimizer, None), **kwargs)
        self.model_accepts_loss_kwargs = True  # makes the loop count the trained tokens for us
        for parameter, data in masters.items():
            parameter.data = data  # TRL rounds adapters of a quantised base to bf16
        self.step = step
        # the loop asks the model, which would walk all its modules: 10 ms with an adapter of an 8B
        step.model.zero_grad = step.optimizer.zero_grad  # type: ignore[method-assign]

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm: Tensor = self.accelerator.clip_grad_norm_(
            self.step.trainable(), self.args.max_grad_norm
        )
        return norm

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        assert num_items_in_batch is not None
        self.num_tokens += inputs["num_tokens"]
        return self.step.loss(inputs, num_items_in_batch)


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Speed and progress bar."""

    def __init__(self, run: Run) -> None:
        self.trainer: _Trainer | None = None
        self._run = run
        self._warm: tuple[float, int] | None = None
        self._bar: Any = None
        self.first_update = 1
        """Of this process; more than 1 when the run was resumed."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the progress bar, at the update that a resumed run begins with."""
        self.first_update = state.global_step + 1
        self._bar = progress_bar(total=state.max_steps, initial=state.global_step, unit="update")

    def _tokens(self) -> int:
        assert self.trainer is not None
        return self.trainer.num_tokens

    def tok_per_s(self) -> float | None:
        """Real tokens per second since the first update ended; that one compiles and warms up."""
        if self._warm is None:
            return None
        began, tokens = self._warm
        seconds = time.monotonic() - began
        return round((self._tokens() - tokens) / seconds, 1) if self._tokens() > tokens else None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock after the first update."""
        if self._warm is None:
            self._warm = time.monotonic(), self._tokens()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the update's loss."""
        if not logs or "loss" not in logs:
            return
        loss, rate = float(logs["loss"]), self.tok_per_s()
        self._bar.update(state.global_step - self._bar.n)
        self._bar.set_postfix(loss=f"{loss:.3f}", tok_per_s=rate)
        self._run.report_progress(
            done=state.global_step, total=state.max_steps, loss=loss, tok_per_s=rate
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the progress bar."""
        self._bar.close()


def _no_checkpointing() -> dict[str, bool]:
    """The trainer's switch stays off: our step recomputes layers itself.

    transformers 5.23 calls it `activation_checkpointing`, 5.17 `gradient_checkpointing`.
    """
    names = SFTConfig.__dataclass_fields__
    name = "activation_checkpointing"
    return {name if name in names else "gradient_checkpointing": False}


def _settings(recipe: Recipe, plan: Plan, folder: Path) -> SFTConfig:
    """The recipe in TRL's words: the one place that knows them."""
    train, choice, updates = recipe.train, plan.figures["choice"], plan.figures["updates"]
    on_gpu = device_type() == "cuda"
    return SFTConfig(
        output_dir=str(folder / CHECKPOINTS),
        max_steps=updates,
        per_device_train_batch_size=choice["micro_batch_rows"],
        gradient_accumulation_steps=choice["gradient_accumulation_steps"],
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule,
        warmup_steps=math.ceil(train.warmup_fraction * updates),
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        train_sampling_strategy="sequential",  # our order, see training_order
        save_strategy="no",
        save_total_limit=2,
        bf16=False,
        fp16=on_gpu and not find_host(recipe.memory.host).bfloat16,
        use_cpu=not on_gpu,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},  # batches are fetched while the device works
        **_no_checkpointing(),
    )


def ways_of(recipe: Recipe, choice: dict[str, Any]) -> Ways:
    """How the step is computed: as planned, but for what is not right on this machine.

    Args:
        recipe: What is trained.
        choice: Of its plan; an older one does not join sums.
    """
    joined = choice.get("joined", False) and joins_sums(METHODS[recipe.method], training_host())
    here = choice | {"joined": joined}
    return Ways(**{field.name: here[field.name] for field in fields(Ways)})


def _order(lengths: Sequence[int], recipe: Recipe, plan: Plan) -> list[int]:
    choice = plan.figures["choice"]
    per_update = choice["micro_batch_rows"] * choice["gradient_accumulation_steps"]
    num_rows = plan.figures["updates"] * per_update
    return training_order(lengths, num_rows, recipe.train.seed)


def _training_rows(recipe: Recipe, prepared: Prepared, plan: Plan) -> tuple[Dataset, Collator]:
    """Rows in the order of training, and what makes a batch of some of them.

    The loop asks for a `datasets.Dataset`; packed rows are put together from their numbers.
    """
    shape = plan.figures["choice"]["packed"]
    if shape is None:
        rows = prepared.token_rows(recipe.dataset).train
        return rows.select(_order(rows["length"], recipe, plan)), collate
    packed, filled = prepared.packed_rows(recipe.dataset), PackedShape(**shape)
    order = _order(packed.sums("length").tolist(), recipe, plan)

    def collate_packed(numbers: Sequence[dict[str, int]]) -> Batch:
        return collate(packed.take([row[PACKED_ROW] for row in numbers]), filled)

    return Dataset.from_dict({PACKED_ROW: order}), collate_packed


def _checkpoints(run: Run, prepared: Prepared, plan: Plan) -> Checkpoints:
    inputs = {
        "recipe": run.recipe.to_dict(),
        "rows_sha256": prepared.inputs["rows_sha256"],
        "choice": plan.figures["choice"],
        "base": fingerprint_base(model_source(run.recipe.model)),
    }
    return Checkpoints(run.stage_folder(Trained.name) / CHECKPOINTS, inputs)


def _require_room(trainer: _Trainer) -> None:
    """Room for the checkpoints that stay, the one being written and the result."""
    weights = sum(weight.numel() * weight.element_size() for weight in trainer.step.trainable())
    moments = 2 * sum(weight.numel() * 4 for weight in trainer.step.trainable())
    left = max(0, KEPT + 1 - trainer.checkpoints.count())
    require_room(trainer.checkpoints.folder, left * (weights + moments) + weights)


def _build_trainer(
    run: Run, prepared: Prepared, plan: Plan, watch: _Watch, watches: Watches
) -> _Trainer:
    recipe, device = run.recipe, device_type()
    require_known_tokens(recipe, prepared)
    dtype = native_dtype(device, bfloat16=find_host(recipe.memory.host).bfloat16)
    torch.manual_seed(recipe.train.seed)
    model = build(recipe, device, dtype)
    rows, collator = _training_rows(recipe, prepared, plan)
    watch.trainer = _Trainer(
        TrainingStep(model, recipe.train, ways_of(recipe, plan.figures["choice"])),
        args=_settings(recipe, plan, run.stage_folder(Trained.name)),
        train_dataset=rows,
        data_collator=collator,
        processing_class=load_tokenizer(recipe),
        callbacks=[watch],
        checkpoints=_checkpoints(run, prepared, plan),
        guard=Guard(watches.hang, recipe.train.save_every_minutes * 60, watches.is_asked),
    )
    watch.trainer.remove_callback(PrinterCallback)  # the progress bar shows the losses
    return watch.trainer


def out_of_memory(recipe: Recipe, plan: Plan, what: str, peak_bytes: int | None) -> FitError:
    """The error of a run that took more memory than there was.

    Args:
        recipe: What ran.
        plan: Its plan.
        what: What happened.
        peak_bytes: The most that was allocated, where it is known.
    """
    planned, seen = format_gib(plan.figures["peak_bytes"]), format_gib(peak_bytes)
    return FitError(
        f"{what}; the plan's peak is {planned}, the peak seen {seen}",
        fix=less_memory(recipe, plan.figures),
    )


def _names_of(recipe: Recipe, prepared: Prepared, rows: Dataset, numbers: list[int]) -> list[str]:
    if PACKED_ROW not in rows.column_names:
        return prepared.names_of(rows, numbers)
    packed = prepared.packed_rows(recipe.dataset)
    return prepared.names_of(packed, rows[numbers][PACKED_ROW])


def _kept(trainer: _Trainer) -> str:
    update = trainer.state.global_step
    if trainer.checkpoints.has(update):
        return f"update {update} is saved"
    return (
        "the last checkpoint stays" if trainer.checkpoints.count() else "none was finished before"
    )


def _not_finite(
    run: Run, prepared: Prepared, plan: Plan, trainer: _Trainer, error: NotFiniteError
) -> StageError:
    choice, base = plan.figures["choice"], base_of(trainer.step.model)
    size, steps = choice["micro_batch_rows"], choice["gradient_accumulation_steps"]
    first = [((error.update - 1) * steps + index) * size for index in error.micro_batches]
    numbers = [start + offset for start in first for offset in range(size)]
    rows = _names_of(run.recipe, prepared, trainer.train_dataset, numbers)
    return StageError(
        f"{error}; {_kept(trainer)}\n  its rows: {'; '.join(rows)}",
        fix=finite_again(
            run.recipe,
            error.update,
            device=device_type(),
            is_float16=base.dtype is torch.float16,
            model_type=base.config.model_type,
        ),
    )


def _run_loop(
    run: Run, prepared: Prepared, plan: Plan, trainer: _Trainer, watches: Watches
) -> None:
    """Train to the end, or save the last finished update and say why it ended before."""
    try:
        trainer.continue_training()
    except NotFiniteError as error:
        trainer.save_finished()
        raise _not_finite(run, prepared, plan, trainer, error) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        trainer.save_finished()
        peak = torch.cuda.max_memory_allocated() if device_type() == "cuda" else None
        what = f"no memory is left; {_kept(trainer)}"
        raise out_of_memory(run.recipe, plan, what, peak) from error
    if trainer.state.global_step < trainer.state.max_steps:
        raise watches.stop_error(trainer.state.global_step, trainer.state.max_steps)


def _save(model: nn.Module, folder: Path) -> None:
    """Write the trained weights to a temporary folder, then rename it."""
    temporary = folder / f".{ADAPTER}"
    for old in (temporary, folder / ADAPTER):
        shutil.rmtree(old, ignore_errors=True)
    model.save_pretrained(temporary)  # type: ignore[operator]
    temporary.rename(folder / ADAPTER)


def _require_right(run: Run, plan: Plan) -> None:
    """Try what the plan chose, unless that is known: it may be of another machine, or driver."""
    host, recipe = training_host(), run.recipe
    heads, method = architecture_of(read_config(recipe)).heads, METHODS[recipe.method]
    require_right(heads, method, host)
    planned_here = recipe.memory.host in ("auto", "cpu")
    again = (
        f"{run.resume_command} --from plan"
        if planned_here
        else f"{run.resume_command} --set memory.host=auto --from plan"
    )
    require_attention(plan.figures["choice"]["attention"], heads, host, again)
    if (library := fastest_blas(method, host)) is not None:
        torch.backends.cuda.preferred_blas_library(library)


def _train(run: Run, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    prepared, plan = run.require(Prepared), run.require(Plan)
    plan.require_fit()
    _require_right(run, plan)
    missed = [name for name, value in seen_by_torch().items() if value is None]
    capped = cap(plan.figures["host"]["budget_bytes"], plan.figures["reserved_bytes"])
    watch, watches = _Watch(run), Watches(run)
    if capped.warning:
        watches.warn(capped.warning)
    if missed and torch.version.hip is not None:
        watches.warn(f"{', '.join(missed)} was set after torch was imported: import strixft first")
    with watches.watching() as seen:
        trainer = _build_trainer(run, prepared, plan, watch, watches)
        _require_room(trainer)
        began = time.monotonic()
        with peak_memory(trainer.step.model) as memory:
            _run_loop(run, prepared, plan, trainer, watches)
        seconds, rate = time.monotonic() - began, watch.tok_per_s()
        memory["peak_parts"] = memory["peak_parts"] or device_parts(
            trainer.step.model, trainer.step.optimizer, memory["peak_bytes"]
        )
        _save(trainer.step.model, folder)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    figures = {
        "first_update": watch.first_update,
        "updates": trainer.state.global_step,
        "losses": losses,
        "spikes": loss_spikes(losses),
        "tokens": trainer.num_tokens,
        "tok_per_s": rate,
        "train_seconds": round(seconds, 3),
        **planned_figures(plan.figures),
        **memory,
        **seen,
        "cap": capped.says,
        "checkpoints_set_aside": trainer.checkpoints.torn,
    }
    inputs = {
        "rows_sha256": prepared.inputs["rows_sha256"],
        "choice": plan.figures["choice"],
        "base": fingerprint_base(model_source(run.recipe.model)),
    }
    return inputs, figures


def train_recipe(run: Run) -> Trained:
    """Train a planned run; the weights lie in `train/adapter`.

    Raises:
        FitError: The plan does not fit, or the device or the host ran out of memory.
        StageError: An earlier stage has not run, or a loss or a gradient is no finite number.
        Stopped: The user asked for it; the last finished update is saved.
    """
    return run.once(Trained, lambda folder: _train(run, folder))
