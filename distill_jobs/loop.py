"""The training loop every phase runs in: updates, logs, checkpoints, exact resume, rewinds, clean stops."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from rich.progress import Progress, TaskID
from torch import Tensor

from distill_jobs.checkpoint import Checkpoint, intact_checkpoint, load_checkpoint, write_checkpoint
from distill_jobs.errors import DivergedError, Interrupted, JobError, StorageError, first_line
from distill_jobs.processes import Processes
from distill_jobs.signals import StopSignal
from distill_jobs.state import Phase, RowLoss, TrainingState

MAX_BAD_UPDATES = 3
MAX_REWINDS = 3

SECTIONS = {
    "autoencoder": "teacher.autoencoder",
    "text_encoder": "teacher.text.training",
    "v_finetune": "teacher.v_finetune",
    "finetune": "teacher.finetune",
}
OURS = {"glyph_encoder"}
CHAINS = {"d": "stage_two", "u": "stage_two", "e": "encoder"}
"""Where a recipe has a phase, if not under its name; phases that none has; where a halving is, by its prefix."""


@dataclass
class Trainer:
    """Runs phases. checkpoints: their root folder; every, log_every: updates between two."""

    processes: Processes
    checkpoints: Path
    every: int
    log_every: int
    stop: StopSignal
    progress: Progress

    def train(self, phase: Phase) -> tuple[dict[str, Tensor], float]:
        """Train to the end, resuming where a checkpoint stands. Returns the finished weights, which the first
        process alone gets, and training seconds.

        An update whose loss or gradient is not finite is skipped; after MAX_BAD_UPDATES in a row, or when weights
        are not finite where a checkpoint is due, the phase goes back to its last checkpoint and on with half the
        learning rate, at most MAX_REWINDS times.
        Raises: Interrupted after a signal (a checkpoint is written); DivergedError; StorageError.
        """
        return _Run(self, phase).run()


class _Run:
    """One phase on its way."""

    def __init__(self, trainer: Trainer, phase: Phase) -> None:
        self._trainer, self._phase, self._processes = trainer, phase, trainer.processes
        self._folder = trainer.checkpoints / phase.name
        with self._advised():
            self._state = TrainingState(phase, trainer.processes)
        self._spent, self._started = 0.0, time.monotonic()
        self._task = TaskID(0)

    def run(self) -> tuple[dict[str, Tensor], float]:
        state, updates = self._state, self._phase.training.updates
        if not self._restore():
            self._write()
        self._task = self._trainer.progress.add_task(
            self._phase.name, total=updates, completed=state.update, loss=""
        )
        self._started = time.monotonic()
        while state.update < updates:
            loss = self._advance()
            self._log(loss)
            [stopping] = self._processes.any(self._trainer.stop.received)
            ended = state.update == updates
            due = stopping or ended or state.update % self._trainer.every == 0
            if state.streak >= MAX_BAD_UPDATES or (due and not state.finite()):
                self._rewind()
            elif due and not ended and not state.streak:
                self._write()
            if stopping and state.update < updates:
                raise Interrupted(f"stopped in {self._phase.name} at update {state.update}; go on with --resume")
        return state.finish(), self._seconds()

    def _advance(self) -> RowLoss | None:
        with self._advised():
            return self._state.advance()

    @contextmanager
    def _advised(self) -> Iterator[None]:
        """Where the device's memory ends, say how the phase goes on in less."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            training = self._phase.training
            raise JobError(
                f"{self._phase.name}: too little memory on the device for {training.batch_size} rows in "
                f"{training.accumulate} micro-batches ({first_line(error)}); {self._with_less_memory()}"
            ) from None

    def _with_less_memory(self) -> str:
        """What lets the phase go on in less, if the recipe has anything left."""
        training, name = self._phase.training, SECTIONS.get(self._phase.name, self._phase.name)
        section = CHAINS.get(name[0], name) if name[1:].isdigit() else name
        most = training.batch_size // self._processes.count
        finer = (n for n in range(2 * training.accumulate, most + 1) if most % n == 0)
        if name in OURS:
            return "run this command without the device: the CPU does this phase in minutes"
        sets = [f"{section}.accumulate={n}" for n in islice(finer, 1)]
        if not self._processes.compute.gradient_checkpointing:
            sets.append("compute.gradient_checkpointing=true")
        if not sets:
            return "only a device with more memory helps, or several with compute.shard=true in a new folder"
        return f"go on with --resume --set {' or --set '.join(sets)}, which change nothing but rounding"

    def _restore(self, every: int = 1) -> bool:
        """Take up the newest intact checkpoint at a multiple of ``every``, if there is one."""
        path = self._processes.first(lambda: intact_checkpoint(self._folder, every))
        if path is None:
            return False
        checkpoint = load_checkpoint(path)
        with self._advised():
            self._state.restore(checkpoint)
        self._spent = checkpoint.seconds
        return True

    def _write(self) -> None:
        state = self._state
        checkpoint = Checkpoint(state.update, self._seconds(), state.tensors(), state.rewinds)
        self._processes.first(lambda: write_checkpoint(self._folder, checkpoint, self._trainer.every))

    def _rewind(self) -> None:
        state, failed_at, rewinds, seconds = self._state, self._state.update, self._state.rewinds, self._seconds()
        what = f"{self._phase.name}: loss, gradient or weights not finite up to update {failed_at}"
        # Not to where a signal stopped the job, as an uninterrupted one has no checkpoint there; unless there is no
        # other, as after a resume with a larger ``every``.
        if rewinds == MAX_REWINDS or not (self._restore(self._trainer.every) or self._restore()):
            raise DivergedError(
                f"{what}, after {rewinds} rewinds, each with half the learning rate; "
                f"start again with an lr well below {self._phase.training.lr:g} in a new folder, which takes the "
                f"phases before it (--out NEW --from {self._trainer.checkpoints.parent})"
            )
        state.rewinds = rewinds + 1
        self._spent, self._started = seconds, time.monotonic()
        self._say(f"{what}; back to update {state.update}, with half the learning rate")

    def _seconds(self) -> float:
        return self._spent + time.monotonic() - self._started

    def _log(self, loss: RowLoss | None) -> None:
        name, state, progress = self._phase.name, self._state, self._trainer.progress
        progress.update(self._task, completed=state.update)
        if loss is None:
            self._say(f"{name}: update {state.update} skipped: its loss or gradient is not finite")
            return
        if state.update % self._trainer.log_every:
            return
        whole = RowLoss(
            self._processes.gathered(loss.loss), None if loss.w is None else self._processes.gathered(loss.w)
        )
        values = {f"{name}/loss": float(whole.loss.mean()), f"{name}/lr": state.lr}
        if whole.w is not None:
            values |= {f"{name}/loss_{bin_name}": mean for bin_name, mean in loss_by_w(whole).items()}
        self._record(values)
        progress.update(self._task, loss=f"loss {values[f'{name}/loss']:.4f}")

    def _record(self, values: dict[str, float]) -> None:
        try:
            self._processes.accelerator.log(values, step=self._state.update)
        except OSError as error:
            raise StorageError(
                f"TensorBoard's file cannot be written ({error}); free some space and --resume"
            ) from None

    def _say(self, text: str) -> None:
        self._trainer.progress.console.log(text)


def loss_by_w(loss: RowLoss, bins: int = 4) -> dict[str, float]:
    """Mean loss at w = 0 and in equal w-bins: large w dominates the total, so the total hides the rest."""
    assert loss.w is not None
    values = {}
    if bool((loss.w == 0).any()):
        values["w_zero"] = float(loss.loss[loss.w == 0].mean())
    top = max(float(loss.w.max()), 1e-6)
    cell = (loss.w / top * bins).long().clamp(max=bins - 1)
    for b in range(bins):
        chosen = (cell == b) & (loss.w > 0)
        if bool(chosen.any()):
            values[f"w_bin{b}"] = float(loss.loss[chosen].mean())
    return values
