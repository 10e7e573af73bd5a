"""The training loop: updates one after the other, from the newest whole checkpoint on.

It looks between micro-batches whether to stop, and before each update whether to make it. Whatever
ends it early, the unfinished update is dropped and the last finished one can be saved.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from strixft.data.batches import Batch
from strixft.guard.watch import HangWatch
from strixft.recipe.schema import Train
from strixft.run.log import Record
from strixft.step.update import TrainingStep
from strixft.train.checkpoints import Checkpoint, Checkpoints
from strixft.train.coverage import FirstUpdates, not_finite
from strixft.train.held_out import Evaluation, HeldOut

MOST_SKIPPED = 20
"""Consecutive updates that float16's scaler may skip before training stops."""

WEIGHTS, STATE = "trained.safetensors", "state.pt"
"""Files of a checkpoint: trained weights by name; optimizer, schedule, generators and progress."""


class NotFiniteError(Exception):
    """A loss or a gradient is not finite; the weights are those of the update before."""

    def __init__(self, update: int, what: str, value: str, micro_batches: Sequence[int]) -> None:
        super().__init__(f"the {what} of update {update} is {value}")
        self.update, self.micro_batches = update, micro_batches


class _StopAsked(Exception):
    """Raised to leave an unfinished update."""


@dataclass
class Progress:
    """Finished work, in earlier processes too."""

    update: int = 0
    tokens: int = 0
    """Real tokens, without padding."""
    losses: list[float] = field(default_factory=list)
    """Mean loss of a trained token, one an update."""
    evaluations: list[Evaluation] = field(default_factory=list)
    """Held-out losses, in order."""


def _random_states() -> dict[str, Any]:
    """Return the state of every generator that training may draw from."""
    kind, keys, *rest = tuple(np.random.get_state(legacy=True))
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),  # no array: torch.load reads no pickle
        "torch": torch.get_rng_state(),
        "gpu": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["gpu"] is not None:
        torch.cuda.set_rng_state(states["gpu"])


def rate_factor(train: Train, updates: int) -> Callable[[int], float]:
    """Return the learning rate of each update, counted from 0, relative to its peak.

    It rises over the warm-up, whose first update already learns, and then follows the schedule.
    A warm-up always leaves at least one update at the peak.

    >>> factor = rate_factor(Train(warmup_fraction=0.5, schedule="linear"), 4)
    >>> [round(factor(update), 2) for update in range(4)]
    [0.33, 0.67, 1.0, 0.5]
    """
    warmup = min(math.ceil(train.warmup_fraction * updates), updates - 1)

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / (warmup + 1)
        done = min(1.0, (update - warmup) / (updates - warmup))
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[
            train.schedule
        ]

    return factor


class TrainingLoop:
    """`TrainingStep.update`, until all updates are finished or somebody asks for a stop.

    Args:
        step: The training step of the model.
        batches: Returns the micro-batches of an update, counted from 0, on the device.
        updates: Updates of the whole run.
        checkpoints: The run's checkpoints.
        hang: Told of every micro-batch.
        reserve_bytes: Memory that the allocator may keep between updates; None for any.
        is_asked: Returns whether somebody wants the training to stop.
        on_update: Called after each update with the progress and the update's own figures:
            `update`, `seconds`, `loss`, `learning_rate`, and `grad_norm`, before clipping, None
            where it is not finite and the update was skipped.
        first: Watches the first updates of this process.
        held_out: Takes losses between updates, and tells when to end early.
        on_held_out: Called after each evaluation with all that were made, the new one last.
    """

    def __init__(
        self,
        step: TrainingStep,
        batches: Callable[[int], list[Batch]],
        updates: int,
        checkpoints: Checkpoints,
        hang: HangWatch,
        *,
        reserve_bytes: int | None = None,
        is_asked: Callable[[], bool],
        on_update: Callable[[Progress, Record], None],
        first: FirstUpdates | None = None,
        held_out: HeldOut | None = None,
        on_held_out: Callable[[Sequence[Evaluation]], None] = lambda done: None,
    ) -> None:
        self.step, self.updates, self.checkpoints = step, updates, checkpoints
        self.progress, self.first_update = Progress(), 1
        self._batches, self._hang = batches, hang
        self._is_asked, self._on_update, self._first = is_asked, on_update, first
        self._held_out, self._on_held_out = held_out, on_held_out
        self._schedule = LambdaLR(step.optimizer, rate_factor(step.settings, updates))
        self._processes = PartialState()
        self._ahead: list[Batch] = []
        self._random = _random_states()
        self._updating = False  # the weights are between two updates
        self._skipped = 0
        self._reserve_bytes, self._released = reserve_bytes, -2
        self._began, self._norm = 0.0, 0.0  # of the update

    @property
    def stopped_early(self) -> str | None:
        """The reason to end before the last update, if there is one."""
        held_out = self._held_out
        if held_out is None or self.progress.update >= self.updates:
            return None
        return held_out.stop_reason(self.progress.evaluations)

    @property
    def is_over(self) -> bool:
        """Return whether the training is complete."""
        return self.progress.update >= self.updates or self.stopped_early is not None

    def run(self, checkpoint: Checkpoint | None = None) -> None:
        """Train from a checkpoint, or from the start.

        Raises:
            NotFiniteError: A loss or gradient is not finite.
        """
        if checkpoint is not None:
            self._resume(checkpoint)
        saved = time.monotonic()  # setting the clock cannot delay a checkpoint
        try:
            self._evaluate()
            while not self.is_over and not self._is_asked():
                self._began = time.monotonic()
                batches = self._ahead or self._batches(self.progress.update)
                self._ahead = []
                loss = self.step.update(
                    batches,
                    self._over_processes(sum(len(batch["labels"]) for batch in batches)),
                    after_batch=self._after_batch,
                    before_step=self._before_step,
                )
                self._finish_update(batches, loss)
                self._evaluate()
                if time.monotonic() - saved > self.step.settings.save_every_minutes * 60:
                    self.save()
                    saved = time.monotonic()
        except _StopAsked:
            _restore(self._random)
        finally:
            self._hang.pause()
        if not self.is_over:
            self.save()

    def _evaluate(self) -> None:
        """Take the held-out losses where they are due; no generator moves."""
        update, done, held_out = self.progress.update, self.progress.evaluations, self._held_out
        if held_out is None or not held_out.is_due(update, self.updates, done):
            return
        before = _random_states()
        try:
            done.append(held_out.evaluate(self.step, update, self._after_batch))
        finally:
            _restore(before)
        self._hang.pause()
        self._on_held_out(done)

    def _over_processes(self, count: int) -> int:
        """Return the sum of a count over all processes."""
        if self._processes.num_processes == 1:
            return count
        return int(reduce(torch.tensor(count, device=self._processes.device), "sum"))

    def _after_batch(self) -> None:
        self._hang.beat()
        if self._is_asked():
            raise _StopAsked

    def _before_step(self, losses: Tensor, norm: Tensor) -> None:
        """Refuse an update that would spoil the weights.

        Args:
            losses: One for each micro-batch, (micro-batches,).
            norm: Of the gradient, before clipping.
        """
        update = self.progress.update + 1
        if update < self.updates:  # from here on the device is waited for
            self._ahead = self._batches(update)
        *seen, total = torch.cat([losses, norm.reshape(1).to(losses)]).tolist()
        self._norm = total
        bad = [index for index, loss in enumerate(seen) if not np.isfinite(loss)]
        if bad:
            raise NotFiniteError(update, "loss", f"{seen[bad[0]]}", bad)
        if not np.isfinite(total) and not self.step.scaler.is_enabled():
            value = f"not a finite number{not_finite(self.step)}"
            raise NotFiniteError(update, "gradient", value, range(len(seen)))
        if self._first is not None:
            self._first.before_step()
        self._updating = True

    def _finish_update(self, batches: list[Batch], loss: Tensor) -> None:
        """Take note of an update, with its loss, ()."""
        if self._first is not None:
            self._first.after_step()
        self._skipped = self._skipped + 1 if self.step.skipped else 0
        if self._skipped >= MOST_SKIPPED:
            value = f"not a finite number, as in {MOST_SKIPPED} updates in a row"
            raise NotFiniteError(self.progress.update + 1, "gradient", value, range(1))
        rate = self._schedule.get_last_lr()[0]
        if not self.step.skipped:
            self._schedule.step()
        self._release_cache()
        self._updating, self._random = False, _random_states()
        self.progress.update += 1
        self.progress.tokens += sum(batch["num_tokens"] for batch in batches)
        self.progress.losses.append(float(loss))
        seconds = time.monotonic() - self._began
        record: Record = {"update": self.progress.update, "seconds": round(seconds, 3)}
        norm = self._norm if math.isfinite(self._norm) else None  # JSON has no other numbers
        record |= {"loss": self.progress.losses[-1], "learning_rate": rate, "grad_norm": norm}
        self._on_update(self.progress, record)

    def _release_cache(self) -> None:
        """Give cached memory back where micro-batches of many sizes have filled it beyond the plan.

        Once is enough, if the very next update needs as much: then it is what the step needs.
        """
        if self._reserve_bytes is None or not torch.cuda.is_available():
            return
        if torch.cuda.memory_reserved() <= self._reserve_bytes:
            return
        torch.cuda.empty_cache()
        if self.progress.update == self._released + 1:
            self._reserve_bytes = None
        self._released = self.progress.update

    def _parts(self) -> dict[str, Any]:
        """Return everything with a `state_dict` that a checkpoint holds."""
        step = self.step
        return {"optimizer": step.optimizer, "schedule": self._schedule, "scaler": step.scaler}

    def save(self) -> None:
        """Write a checkpoint of the last finished update, unless it is there or nothing is."""
        update = self.progress.update
        if update == 0 or self.checkpoints.has(update):
            return
        self._hang.pause()
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"random": self._random, "progress": asdict(self.progress)}
        with self.checkpoints.writing(update) as folder:
            weights = {
                name: w.detach().cpu().contiguous() for name, w in self.step.named_trainable()
            }
            save_file(weights, folder / WEIGHTS)
            torch.save(state, folder / STATE)

    def save_finished(self) -> None:
        """Save the last finished update after an error, where its weights are still there."""
        if not self._updating:
            _restore(self._random)
            self.save()

    def _resume(self, checkpoint: Checkpoint) -> None:
        state = torch.load(checkpoint.folder / STATE, map_location="cpu", weights_only=True)
        weights = load_file(checkpoint.folder / WEIGHTS)
        with torch.no_grad():
            for name, weight in self.step.named_trainable():
                weight.copy_(weights[name])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self._random, self.progress = state["random"], Progress(**state["progress"])
        _restore(self._random)
        self.first_update = self.progress.update + 1
