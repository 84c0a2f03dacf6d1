"""What the phases of a job share: rows, guidance weights, and that a finished phase is a finished folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from distill_jobs.checkpoint import write_folder
from distill_jobs.data.latents import LatentSource
from distill_jobs.data.masked_latents import MaskedLatentSource
from distill_jobs.data.source import Source
from distill_jobs.draws import Draw, Draws
from distill_jobs.loop import Trainer
from distill_jobs.objectives import Noisy, Tables
from distill_jobs.pipelines.folder import PipelineFolder
from distill_jobs.pipelines.writing import complete
from distill_jobs.processes import Processes
from distill_jobs.recipe import Recipe
from distill_jobs.run_folder import RunFolder
from distill_jobs.sections import Training
from distill_jobs.state import Loss, Phase
from distill_jobs.student import Trained, load_stock, save_stock, with_weights
from engines.guidance import weight_from_scale
from engines.schedule import NoiseSchedule

Save = Callable[[Path, Any], UNet2DConditionModel]

LATE = 0.85
"""From this share of the timesteps on, noise hides what an image shows, and a network can only go by its prompt."""


def stands(folder: Path, processes: Processes) -> bool:
    """Whether the phase that makes ``folder`` is finished."""
    return processes.first((folder / "phase.json").is_file)


def train_into(
    folder: Path, trainer: Trainer, phase: Phase, fill: Callable[[Path, dict[str, Tensor]], None]
) -> None:
    """Train a phase to its end; ``fill`` writes the finished weights, in the first process.

    The phase's network has them too.
    """
    weights, seconds = trainer.train(phase)

    def whole(staging: Path) -> None:
        fill(staging, weights)
        record = {"name": phase.name, "updates": phase.training.updates, "seconds": round(seconds, 1)}
        (staging / "phase.json").write_text(json.dumps(record), encoding="utf-8")

    def keep() -> None:
        write_folder(folder, whole)
        shutil.rmtree(trainer.checkpoints / phase.name)

    trainer.processes.first(keep)
    trainer.progress.console.log(f"{phase.name}: {phase.training.updates} updates in {seconds:.0f} s")


def late(u: Tensor, share: float) -> Tensor:
    """Times in [0, 1) of u: (B,) uniform in it; the highest ``share`` of them becomes uniform from LATE on."""
    uniform = 1 - share
    return torch.where(u < uniform, u / uniform, LATE + (1 - LATE) * (u - uniform) / max(share, 1e-12))


class Phases:
    """One recipe on one source of data, in one run folder. teacher: the pipeline folder it begins with, if any."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        trainer: Trainer,
        source: Source,
        teacher: PipelineFolder | None = None,
    ) -> None:
        self.recipe, self.folder, self.trainer, self.teacher = recipe, folder, trainer, teacher
        self.schedule = NoiseSchedule(recipe.schedule)
        self.processes = trainer.processes
        self.device = trainer.processes.device
        self.tables = Tables.of(self.schedule, self.device, recipe.guidance.off(self.schedule))
        self._source = source

    def train(
        self,
        name: str,
        training: Training,
        start: Callable[[], nn.Module],
        loss: Loss,
        folder: Path,
        average: nn.Module | None = None,
        save: Save | None = None,
        trained: Trained | None = None,
    ) -> None:
        """Train the network that ``start`` makes into ``folder``, unless that stands already.

        average: a network of the same shape that holds the weight average while training, for ``loss`` to use.
        save: of a network that is no plain one, writes it into the folder and returns the plain one it amounts to.
        trained: of a student, what for.
        """
        if self.stands(folder):
            return
        network = start()
        phase = Phase(name, training, network, Draws(self.recipe.seed, name), loss, average)

        def fill(staging: Path, weights: dict[str, Tensor]) -> None:
            plain = with_weights(network, weights) if save is None else save(staging, network)
            self._save(staging, plain, trained)

        train_into(folder, self.trainer, phase, fill)

    def stands(self, folder: Path) -> bool:
        """Whether a phase is finished."""
        return stands(folder, self.processes)

    def frozen(self, folder: Path) -> nn.Module:
        """The finished network in ``folder``, to be learned from."""
        return self.processes.frozen(load_stock(folder))

    def write(self, folder: Path, network: UNet2DConditionModel, trained: Trained | None = None) -> None:
        """Keep a network that no training made, as a stock folder. trained: of a student, what for."""
        self.processes.first(lambda: write_folder(folder, lambda staging: self._save(staging, network, trained)))

    def _save(self, staging: Path, network: UNet2DConditionModel, trained: Trained | None) -> None:
        """A stock folder; a whole pipeline where the teacher was one.

        With the parts of the run's own teacher once that stands: another's may be on a disk that has no links here.
        """
        told = None if trained is None else replace(trained, guidance_scale=self.recipe.served)
        save_stock(staging, network, self.schedule, self.recipe.clip, told)
        if self.teacher is None:
            return
        own = self.folder.teacher
        complete(staging, replace(self.teacher, path=own) if (own / "model_index.json").is_file() else self.teacher)

    def say(self, text: str) -> None:
        self.trainer.progress.console.log(text)

    def noisy(
        self, draws: Draws, update: int, batch: int, t: Tensor | None = None, late_share: float = 0.0
    ) -> Noisy:
        """The rows of an update; t: (B,) table indices, or uniform ones but for ``late_share`` of them."""
        data = self._source.batch(draws, update, batch)
        if t is None:
            t = (late(draws.stratified(update, batch, Draw.TIME), late_share) * self.schedule.timesteps).long()
        noise = draws.normal(update, tuple(data.x.shape))
        null = self._source.null(batch).framed_as(data.condition)
        return Noisy(data.x, data.condition, null, noise, t, data.extra).to(self.device)

    def clean(self, draws: Draws, update: int, batch: int) -> Tensor:
        """(B, C, h, w) images or latents of the data: the rows of an update without noise."""
        return self._source.batch(draws, update, batch).x.to(self.device)

    def pictures(self, draws: Draws, update: int, batch: int) -> Tensor:
        """(B, 3, H, W) in -1 … 1: what the latents of the rows of an update were made from."""
        assert isinstance(self._source, LatentSource | MaskedLatentSource)
        return self._source.pixels(draws, update, batch).to(self.device)

    def weights(self, draws: Draws, update: int, batch: int, unguided_share: float) -> Tensor:
        """(B,) guidance weights, uniform over the range, with a share at its lowest exactly."""
        low, high = (weight_from_scale(s) for s in (self.recipe.guidance.min, self.recipe.guidance.max))
        u = draws.stratified(update, batch, Draw.GUIDANCE)
        spread = low + (high - low) * (u - unguided_share).clamp(min=0) / (1 - unguided_share)
        return spread.to(self.device, torch.float32)
