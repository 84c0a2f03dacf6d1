"""A phase under way: network, optimiser, weight average, and how many updates they have had."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from distill_jobs.checkpoint import Checkpoint
from distill_jobs.draws import Draws
from distill_jobs.processes import Processes
from distill_jobs.sections import Training
from distill_jobs.sharding import fill, local, part, sharded, whole

REWIND_LR = 0.5


@dataclass(frozen=True)
class RowLoss:
    """loss: (B,) weighted, what is minimised; w: (B,) guidance weights for the per-bin log, or None."""

    loss: Tensor
    w: Tensor | None = None


Loss = Callable[[nn.Module, Draws, int, int], RowLoss]


@dataclass(frozen=True)
class Phase:
    """One optimisation.

    network: trained in place, those of its parameters that take gradients; draws: its randomness; loss: of
    (network, draws, update, rows), where the draws are the share that these ``rows`` rows have in the update's
    batch; average: made to hold the weight average (or the weights, where there is none) all the time, for losses
    that learn from it; not with sharding.
    """

    name: str
    training: Training
    network: nn.Module
    draws: Draws
    loss: Loss
    average: nn.Module | None = None


class TrainingState:
    """One phase's updates. The same in every process; each computes its share of every batch."""

    def __init__(self, phase: Phase, processes: Processes) -> None:
        self._phase, self._processes = phase, processes
        self.update = 0
        self.streak = 0
        self.rewinds = 0
        training = phase.training
        self._rows = training.batch_size // (processes.count * training.accumulate)
        mine = phase.draws.share(processes.index, processes.count)
        self._draws = [mine.share(k, training.accumulate) for k in range(training.accumulate)]
        phase.network.train()
        self._network = processes.trained(phase.network)
        self._parameters = [p for p in phase.network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(self._parameters, lr=training.lr, weight_decay=0.0, fused=True)
        self._optimizer = processes.accelerator.prepare_optimizer(optimizer)
        self._ema = EMAModel(self._held(), decay=training.ema, foreach=True) if training.ema else None
        self._show_average()

    @property
    def lr(self) -> float:
        """Learning rate of the next update: linear warm-up, linear to zero when annealing, halved by a rewind."""
        training = self._phase.training
        rise = min(1.0, (self.update + 1) / max(1, training.warmup))
        fall = 1.0 - self.update / training.updates if training.anneal else 1.0
        return training.lr * rise * fall * REWIND_LR**self.rewinds

    def advance(self) -> RowLoss | None:
        """One update; None when it was skipped because a loss or the gradient was not finite in some process.

        Returns this process's rows.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr
        parts = [self._backward(k) for k in range(len(self._draws))]
        accelerator = self._processes.accelerator
        norm = whole(accelerator.clip_grad_norm_(self._parameters, self._phase.training.clip_norm))
        loss = torch.cat([rows.loss.detach() for rows in parts])
        [bad] = self._processes.any(not (bool(torch.isfinite(loss).all()) and bool(torch.isfinite(norm))))
        if not bad:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)  # before the average, which takes as much memory for a moment
        if not bad and self._ema is not None:
            self._ema.step(self._held())
        self.streak = self.streak + 1 if bad else 0
        self.update += 1
        return None if bad else RowLoss(loss, _joined([rows.w for rows in parts]))

    def finite(self) -> bool:
        """Whether the weights and their average are, in every process."""
        held = [*self._held(), *(self._ema.shadow_params if self._ema else ())]
        return not self._processes.any(not all(bool(torch.isfinite(tensor).all()) for tensor in held))[0]

    def finish(self) -> dict[str, Tensor]:
        """The finished weights by name, as ``tensors`` gives them: the average's where there is one."""
        if self._ema is not None:
            self._ema.copy_to(self._held())
        self._processes.accelerator.free_memory()
        return self._gathered(self._phase.network.state_dict().items())

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resume needs, flat and on the CPU, sharded tensors whole, in the first process.

        All processes must ask; the others get nothing.
        """
        return self._gathered(self._resumed_from())

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up a checkpoint's state, tensor by tensor: what is held meanwhile is no more than training holds."""
        tensors = checkpoint.tensors
        for name, held in self._kept().items():
            fill(held, tensors[f"network.{name}"])
        self._restore_optimizer(tensors)
        if self._ema is not None:
            for i, held in enumerate(self._averages(self._ema)):
                fill(held, tensors[f"ema.{i}"])
            self._ema.optimization_step = int(tensors["ema_step"])
        self.update, self.rewinds, self.streak = checkpoint.update, checkpoint.rewinds, 0

    def _restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Its moments and their step, on the parameters' devices; those held so far are let go first."""
        state = self._optimizer.optimizer.state
        state.clear()
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                parameter = self._parameters[int(index)]
                like = local(parameter) if key == "step" else parameter  # one number, never sharded
                state[parameter][key] = part(value, like)

    def _resumed_from(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of ``tensors`` by name, as this process holds them."""
        yield from ((f"network.{k}", v) for k, v in self._kept().items())
        for i, values in self._optimizer.optimizer.state_dict()["state"].items():
            yield from ((f"optimizer.{i}.{k}", v) for k, v in values.items())
        if self._ema is not None:
            yield from ((f"ema.{i}", average) for i, average in enumerate(self._averages(self._ema)))
            yield "ema_step", torch.tensor(self._ema.optimization_step)

    def _gathered(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Those tensors whole, on the CPU of the first process; the device holds few whole ones at a time."""
        kept = dict[str, Tensor]()
        for name, tensor in tensors:
            full = whole(tensor)
            if self._processes.is_first:
                kept[name] = full.cpu()
        return kept

    def _backward(self, k: int) -> RowLoss:
        """Loss and gradient of one micro-batch; the last one sums the gradients over the processes.

        Those of a sharded network are summed and split after each: kept until the last, they would be whole.
        """
        last = k == len(self._draws) - 1
        accelerator = self._processes.accelerator
        with torch.enable_grad() if last else accelerator.no_sync(self._network):
            rows = self._phase.loss(self._network, self._draws[k], self.update, self._rows)
            accelerator.backward(rows.loss.mean() / len(self._draws))
        return rows

    def _kept(self) -> dict[str, Tensor]:
        """The network's tensors that change: all but its frozen parameters."""
        frozen = {name for name, p in self._phase.network.named_parameters() if not p.requires_grad}
        return {k: v for k, v in self._phase.network.state_dict().items() if k not in frozen}

    def _averages(self, ema: EMAModel) -> list[Tensor]:
        """The weight average of each parameter, sharded as that is, in the memory that it has."""
        return [sharded(average, like) for average, like in zip(ema.shadow_params, self._parameters, strict=True)]

    def _show_average(self) -> None:
        """Let the phase's ``average`` share the memory of the weight average."""
        if self._phase.average is None:
            return
        averaged = self._ema.shadow_params if self._ema is not None else self._parameters
        for parameter, value in zip(self._phase.average.parameters(), averaged, strict=True):
            parameter.data = value.data

    def _held(self) -> list[Tensor]:
        """What this process holds of each parameter."""
        return [local(parameter) for parameter in self._parameters]


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
