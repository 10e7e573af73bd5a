"""TRL's loop with a guard: it stops between micro-batches, and what is saved is whole.

The guard sees every micro-batch and every update. Whatever ends the loop early, the unfinished
update is dropped and the last finished one is saved.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

from strixft.checkpoints import Checkpoints
from strixft.guard import HangWatch

MOST_SKIPPED = 20
"""Updates in a row that float16's scaling may leave out before nothing is learned any more."""


class NotFiniteError(Exception):
    """A loss or a gradient is no finite number; the weights are those of the update before."""

    def __init__(self, update: int, what: str, value: str, micro_batches: Sequence[int]) -> None:
        super().__init__(f"the {what} of update {update} is {value}")
        self.update, self.micro_batches = update, micro_batches


def random_states() -> dict[str, Any]:
    """States of every generator that training draws from."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "gpu": gpu,
    }


def restore(states: dict[str, Any]) -> None:
    """Set every generator back to an earlier state."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["gpu"] is not None:
        torch.cuda.set_rng_state(states["gpu"])


class GuardedTrainer(SFTTrainer):  # type: ignore[misc]
    """Writes checkpoints that are whole, and tells the guard of every micro-batch.

    Args:
        checkpoints: Where they go.
        guard: Added to the callbacks.
        options: As TRL's trainer takes them.
    """

    processing_class: Any

    def __init__(self, *, checkpoints: Checkpoints, guard: Guard, **options: Any) -> None:
        super().__init__(**options)
        self.add_callback(guard)
        self.checkpoints, self.guard = checkpoints, guard
        self.num_tokens = 0
        """Real tokens trained so far, in earlier processes too."""
        self._fetch: Callable[[], Any] | None = None
        self._fetched: Any = None
        guard.trainer = self

    def get_batch_samples(self, *args: Any) -> Any:
        """Batches of an update, and their trained tokens; those that were fetched ahead, if any."""
        self._fetch = functools.partial(super().get_batch_samples, *args)
        fetched, self._fetched = self._fetched or self._fetch(), None
        return fetched

    def fetch_ahead(self) -> None:
        """Make the batches of the next update, while the device is busy with this one."""
        if self._fetch is not None and self.state.global_step + 1 < self.state.max_steps:
            self._fetched = self._fetch()

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch.

        transformers' own walks all modules first, to put them into training mode; there they are.
        """
        with self.compute_loss_context_manager():
            loss = self.compute_loss(
                model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch
            )
        self.accelerator.backward(loss)
        done: Tensor = loss.detach()
        self.guard.micro_losses.append(done)
        self.guard.hang.beat()
        return done

    def floating_point_ops(self, inputs: Any) -> int:
        """None are counted: it would walk all weights for each micro-batch, for a figure unused."""
        return 0

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        update, own_folder = self.state.global_step, self.args.output_dir
        if update == 0 or self.checkpoints.has(update):
            return
        self.guard.hang.pause()
        tokenizer, self.processing_class = self.processing_class, None  # the base has it
        try:
            with self.checkpoints.writing(update, {"tokens": self.num_tokens}) as parent:
                self.args.output_dir = str(parent)
                Trainer._save_checkpoint(self, model, trial)  # TRL's writes a model card each time
        finally:
            self.args.output_dir, self.processing_class = own_folder, tokenizer

    def save_finished(self) -> None:
        """Save the last finished update, after the loop was left in the middle of the next one."""
        if self.guard.drop_unfinished():
            self._save_checkpoint(self.model)

    def continue_training(self) -> None:
        """Train from the newest whole checkpoint, or from the start.

        Raises:
            StageError: The checkpoint belongs to another run.
            NotFiniteError: A loss or gradient is no finite number.
        """
        newest = self.checkpoints.newest()
        if newest is not None:
            self.num_tokens = newest.counters["tokens"]
        self.train(resume_from_checkpoint=None if newest is None else str(newest.folder))


class Guard(TrainerCallback):  # type: ignore[misc]
    """Looks between micro-batches whether to stop, and before each update whether to make it.

    Args:
        hang: Told of every micro-batch.
        save_every_s: Most time between two checkpoints.
        is_asked: Whether somebody wants the training to stop.
    """

    def __init__(self, hang: HangWatch, save_every_s: float, is_asked: Callable[[], bool]) -> None:
        self.trainer: GuardedTrainer | None = None
        self.hang = hang
        self.micro_losses: list[Tensor] = []
        self._save_every_s, self._is_asked = save_every_s, is_asked
        self._saved = time.monotonic()  # no clock that is set can delay a checkpoint
        self._finished: tuple[dict[str, Any], int] | None = None
        self._updating = False
        self._skipped = 0

    def _note_finished(self) -> None:
        assert self.trainer is not None
        self._finished = random_states(), self.trainer.num_tokens
        self._updating = False
        self.micro_losses.clear()

    def drop_unfinished(self) -> bool:
        """Go back to the last finished update; False where its weights are no longer there."""
        if self._finished is None or self._updating:
            return False
        assert self.trainer is not None
        restore(self._finished[0])
        self.trainer.num_tokens = self._finished[1]
        return True

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What a resumed run has finished already."""
        if state.global_step:
            self._note_finished()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop in the middle of an update, if somebody wants it."""
        if self._is_asked():
            self.drop_unfinished()
            control.should_save = control.should_training_stop = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse an update that would spoil the weights.

        Raises:
            NotFiniteError: Its loss or its gradient is no finite number.
        """
        assert self.trainer is not None
        self.trainer.fetch_ahead()  # from here on the device is waited for
        losses = torch.stack(self.micro_losses)  # (micro-batches,)
        weights = self.trainer.step.trainable()
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not args.fp16:  # where float16 is scaled, its scaler leaves such an update out
            losses = torch.cat([losses, norm.reshape(1).to(losses)])
        good = torch.isfinite(losses).tolist()
        if not all(good):
            raise _not_finite(state.global_step + 1, losses.tolist(), len(self.micro_losses))
        self._updating = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An update is finished: save when it is time, stop if somebody wants it."""
        assert self.trainer is not None
        self._check_skipped(state.global_step, self.trainer.accelerator.optimizer_step_was_skipped)
        self._note_finished()
        if time.monotonic() - self._saved > self._save_every_s:
            control.should_save = True
        if self._is_asked():
            control.should_save = control.should_training_stop = True

    def _check_skipped(self, update: int, skipped: bool) -> None:
        self._skipped = self._skipped + 1 if skipped else 0
        if self._skipped >= MOST_SKIPPED:
            value = f"no finite number, as in {MOST_SKIPPED} updates in a row"
            raise NotFiniteError(update, "gradient", value, range(len(self.micro_losses)))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock again."""
        self._saved = time.monotonic()


def _not_finite(update: int, numbers: Sequence[float], micro_batches: int) -> NotFiniteError:
    bad = [index for index, loss in enumerate(numbers[:micro_batches]) if not np.isfinite(loss)]
    if bad:
        return NotFiniteError(update, "loss", f"{numbers[bad[0]]}", bad)
    return NotFiniteError(update, "gradient", "no finite number", range(micro_batches))
