"""The training loop every phase runs in: update, EMA, finiteness, logs, checkpoints, exact resume."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from rich.progress import Progress, TaskID
from torch import Tensor

from distill_jobs.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from distill_jobs.errors import DivergedError, Interrupted
from distill_jobs.recipe import Training

MAX_BAD_UPDATES = 3
LOG_EVERY = 20


@dataclass(frozen=True)
class RowLoss:
    """loss: (B,) weighted, what is minimised; w: (B,) guidance weights for the per-bin log, or None."""

    loss: Tensor
    w: Tensor | None = None


@dataclass(frozen=True)
class Phase:
    """One optimisation: the network it trains in place, and its loss as a function of the update number."""

    name: str
    training: Training
    network: UNet2DConditionModel
    loss: Callable[[UNet2DConditionModel, int], RowLoss]


@dataclass
class StopSignal:
    """Set by the first SIGTERM or SIGINT; the second ends the process at once."""

    received: bool = False

    @contextmanager
    def listening(self) -> Iterator[StopSignal]:
        handled = (signal.SIGTERM, signal.SIGINT)
        previous = [signal.signal(number, self._receive) for number in handled]
        try:
            yield self
        finally:
            for number, handler in zip(handled, previous, strict=True):
                signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = True


@dataclass
class Trainer:
    """Runs phases. checkpoints: their root folder; every: updates between two."""

    accelerator: Accelerator
    checkpoints: Path
    every: int
    stop: StopSignal
    progress: Progress
    _tasks: dict[str, TaskID] = field(default_factory=dict)

    def train(self, phase: Phase) -> float:
        """Train ``phase.network`` in place to the end, resuming where a checkpoint stands.

        The network ends with its EMA weights where the phase has an EMA. Returns seconds of training.
        Raises: Interrupted after a signal (a checkpoint is written); DivergedError.
        """
        state = _TrainingState(phase, self.accelerator)
        folder = self.checkpoints / phase.name
        spent = state.restore(read_checkpoint(folder))
        task = self.progress.add_task(phase.name, total=phase.training.updates, completed=state.update, loss="")
        started = time.monotonic()
        while state.update < phase.training.updates:
            loss = state.advance()
            self._log(phase, state, loss, task)
            seconds = spent + time.monotonic() - started
            if state.update % self.every == 0 or self.stop.received:
                write_checkpoint(folder, Checkpoint(state.update, seconds, state.tensors()))
            if self.stop.received:
                raise Interrupted(f"stopped in {phase.name} at update {state.update}; go on with --resume")
        state.finish()
        return spent + time.monotonic() - started

    def _log(self, phase: Phase, state: _TrainingState, loss: RowLoss | None, task: TaskID) -> None:
        self.progress.update(task, completed=state.update)
        if loss is None or state.update % LOG_EVERY:
            return
        values = {f"{phase.name}/loss": float(loss.loss.mean()), f"{phase.name}/lr": state.lr}
        if loss.w is not None:
            values |= {f"{phase.name}/loss_{name}": mean for name, mean in loss_by_w(loss).items()}
        self.accelerator.log(values, step=state.update)
        self.progress.update(task, loss=f"loss {values[f'{phase.name}/loss']:.4f}")


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


class _TrainingState:
    """Network, optimiser and EMA of a running phase, and how many updates they have had."""

    def __init__(self, phase: Phase, accelerator: Accelerator) -> None:
        self._phase, self._accelerator = phase, accelerator
        self.update = 0
        self._bad = 0
        optimizer = torch.optim.AdamW(
            phase.network.parameters(), lr=phase.training.lr, weight_decay=0.0, fused=True
        )
        phase.network.train()
        self._network, self._optimizer = accelerator.prepare(phase.network, optimizer)
        ema = phase.training.ema
        self._ema = EMAModel(phase.network.parameters(), decay=ema, foreach=True) if ema else None

    @property
    def lr(self) -> float:
        """Learning rate of the next update: linear warm-up, then linear to zero when annealing."""
        training = self._phase.training
        rise = min(1.0, (self.update + 1) / max(1, training.warmup))
        fall = 1.0 - self.update / training.updates if training.anneal else 1.0
        return training.lr * rise * fall

    def advance(self) -> RowLoss | None:
        """One update; None when it was skipped because the loss or the gradient was not finite."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr
        rows = self._phase.loss(self._network, self.update)
        self._accelerator.backward(rows.loss.mean())
        norm = self._accelerator.clip_grad_norm_(self._network.parameters(), self._phase.training.clip_norm)
        finite = bool(torch.isfinite(rows.loss).all()) and bool(torch.isfinite(norm))
        if finite:
            self._optimizer.step()
            if self._ema is not None:
                self._ema.step(self._phase.network.parameters())
        self._optimizer.zero_grad(set_to_none=True)
        self._count_bad(finite)
        self.update += 1
        return RowLoss(rows.loss.detach(), rows.w) if finite else None

    def finish(self) -> None:
        """Leave the weights to keep in the network: the EMA's where there is one."""
        if self._ema is not None:
            self._ema.copy_to(self._phase.network.parameters())
        self._phase.network.eval()
        self._accelerator.free_memory()

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resume needs, flat."""
        state = {f"network.{k}": v for k, v in self._phase.network.state_dict().items()}
        inner = self._optimizer.optimizer.state_dict()["state"]
        state |= {f"optimizer.{i}.{k}": v for i, values in inner.items() for k, v in values.items()}
        if self._ema is not None:
            state |= {f"ema.{i}": p for i, p in enumerate(self._ema.shadow_params)}
            state["ema_step"] = torch.tensor(self._ema.optimization_step)
        return state

    def restore(self, checkpoint: Checkpoint | None) -> float:
        """Take up a checkpoint's state; returns the seconds spent before it."""
        if checkpoint is None:
            return 0.0
        tensors = checkpoint.tensors
        network = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
        self._phase.network.load_state_dict(network)
        inner: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                inner.setdefault(int(index), {})[key] = value
        groups = self._optimizer.optimizer.state_dict()["param_groups"]
        self._optimizer.optimizer.load_state_dict({"state": inner, "param_groups": groups})
        if self._ema is not None:
            self._ema.shadow_params = [tensors[f"ema.{i}"] for i in range(len(self._ema.shadow_params))]
            self._ema.optimization_step = int(tensors["ema_step"])
        self.update = checkpoint.update
        return checkpoint.seconds

    def _count_bad(self, finite: bool) -> None:
        self._bad = 0 if finite else self._bad + 1
        if self._bad >= MAX_BAD_UPDATES:
            raise DivergedError(
                f"{self._phase.name}: the loss or gradient was not finite {self._bad} updates in a row at update "
                f"{self.update}; lower the learning rate ({json.dumps(self._phase.training.lr)}) and start again"
            )
