"""The job: teacher → stage one → its gate → the halvings, each phase kept as a stock diffusers folder.

A finished phase is a finished folder; a resumed job skips those and goes on from the newest checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from distill_jobs.checkpoint import write_folder, write_text
from distill_jobs.data.open import open_source
from distill_jobs.data.source import Source
from distill_jobs.draws import Draw, Draws
from distill_jobs.errors import DivergedError
from distill_jobs.halving import HalvingTables, halving_loss, target_loss
from distill_jobs.loop import Trainer
from distill_jobs.objectives import Noisy, Tables, guided_v, stage_one_loss, teacher_loss
from distill_jobs.processes import Processes
from distill_jobs.recipe import ChainSection, Halving, Recipe, Training
from distill_jobs.run_folder import Machine, RunFolder
from distill_jobs.shared_weights import Grids
from distill_jobs.signals import StopSignal, stop_with_launcher
from distill_jobs.state import Loss, Phase, RowLoss
from distill_jobs.student import (
    fold_grid,
    load_stock,
    new_teacher,
    predict,
    save_stock,
    student_of,
    takes_grid,
    told_its_grid,
    with_weights,
)
from engines.guidance import weight_from_scale
from engines.schedule import NoiseSchedule

GATE_ROWS = 512
GATE_SCALES = 5


def run_job(recipe: Recipe, out: Path, *, resume: bool, progress: Progress) -> RunFolder:
    """Train everything the recipe asks for into ``out``, alone or as one of several processes.

    Raises: RecipeError when the folder holds another recipe's run; LockedError; Interrupted; DivergedError;
    StorageError.
    """
    folder = RunFolder(out)
    processes = Processes(recipe.compute, out)
    with StopSignal().listening() as stop, ExitStack() as held:
        if processes.count > 1:
            stop_with_launcher()
        if not processes.is_first:
            progress = Progress(console=Console(quiet=True), disable=True)

        def take_up() -> Machine:
            held.enter_context(folder.locked())
            folder.take_up(recipe, resume)
            return folder.started_on(here)

        held.callback(processes.accelerator.end_training)
        here = Machine.here(processes.count, processes.device)
        started = processes.first(take_up)
        torch.set_num_threads(started.threads)
        if changed := replace(started, threads=here.threads).differences(here):
            progress.console.log(f"the last bits may differ from an uninterrupted run's: {'; '.join(changed)}")
        processes.accelerator.init_trackers("tensorboard")
        every, log_every = recipe.checkpoint_every, recipe.log_every
        trainer = Trainer(processes, out / "checkpoints", every, log_every, stop, progress)
        _Job(recipe, folder, trainer, open_source(recipe)).run()
    return folder


class _Job:
    """The phases of one recipe on one source of data."""

    def __init__(self, recipe: Recipe, folder: RunFolder, trainer: Trainer, source: Source) -> None:
        self._recipe, self._folder, self._trainer, self._source = recipe, folder, trainer, source
        self._schedule = NoiseSchedule(recipe.schedule)
        self._processes = trainer.processes
        self._device = trainer.processes.device
        self._tables = Tables.of(self._schedule, self._device)

    def run(self) -> None:
        recipe, folder = self._recipe, self._folder
        self._teacher()
        self._stage_one()
        if recipe.stage_two.weights == "shared":
            self._shared_halvings()
        else:
            tables = partial(HalvingTables.of, sampler=recipe.stage_two.sampler)
            self._halvings("d", recipe.stage_two, tables, folder.student)
        if recipe.encoder is not None:
            self._halvings("e", recipe.encoder, HalvingTables.encoding, folder.encoder)
        self._processes.first(lambda: shutil.rmtree(self._trainer.checkpoints, ignore_errors=True))

    def _teacher(self) -> None:
        recipe, section = self._recipe, self._recipe.teacher

        def loss(network: nn.Module, draws: Draws, update: int, batch: int) -> RowLoss:
            rows = self._noisy(draws, update, batch)
            dropped = draws.uniform(update, batch, Draw.DROPOUT) < section.condition_dropout
            return RowLoss(teacher_loss(network, self._tables, rows, dropped.to(self._device)))

        self._phase("teacher", section, lambda: new_teacher(recipe.unet, recipe.seed), loss, self._folder.teacher)

    def _stage_one(self) -> None:
        section, folder = self._recipe.stage_one, self._folder
        if self._processes.first(folder.gate.is_file):
            return
        teacher = self._processes.frozen(load_stock(folder.teacher))

        def loss(network: nn.Module, draws: Draws, update: int, batch: int) -> RowLoss:
            rows = self._noisy(draws, update, batch)
            w = self._weights(draws, update, batch, section.unguided_share)
            return RowLoss(stage_one_loss(network, teacher, self._tables, rows, w) / (1 + w) ** section.w_power, w)

        self._phase("stage_one", section, lambda: student_of(load_stock(folder.teacher)), loss, folder.stage_one)
        self._gate(teacher)

    def _halvings(
        self,
        prefix: str,
        section: ChainSection,
        tables: Callable[[NoiseSchedule, int, torch.device], HalvingTables],
        folder: Callable[[int], Path],
    ) -> None:
        """A chain of networks, each with half the steps of the one before; the first learns from stage one."""
        source = self._folder.stage_one
        for halving in section.halvings:
            n = halving.steps
            if not self._stands(folder(n)):
                self._halve(
                    f"{prefix}{n}", section, halving, tables(self._schedule, n, self._device), source, folder(n)
                )
            source = folder(n)

    def _halve(
        self, name: str, section: ChainSection, halving: Halving, halves: HalvingTables, source: Path, folder: Path
    ) -> None:
        """Train a copy of the network in ``source`` to do in one step what that network does in two."""
        teacher = self._processes.frozen(load_stock(source))

        def loss(network: nn.Module, draws: Draws, update: int, batch: int) -> RowLoss:
            point = (draws.stratified(update, batch, Draw.TIME) * halving.steps).long().to(self._device)
            rows = self._noisy(draws, update, batch, halves.t[point])
            w = self._weights(draws, update, batch, section.unguided_share)
            losses = halving_loss(network, teacher, self._tables, halves, rows, point, w)
            return RowLoss(losses / (1 + w) ** section.w_power, w)

        self._phase(name, section.training(halving), lambda: load_stock(source), loss, folder)

    def _shared_halvings(self) -> None:
        """Teach one network grid after grid; then fold it into a plain student for each."""
        halvings = self._recipe.stage_two.halvings
        steps = tuple(halving.steps for halving in halvings)
        source = self._folder.stage_one
        for position, halving in enumerate(halvings):
            self._learn_grid(source, steps[: position + 1], halving)
            source = self._folder.shared(halving.steps)
        for n in steps:
            if not self._processes.first((self._folder.student(n) / "unet").is_dir):
                folded = fold_grid(load_stock(source), n)
                self._processes.first(partial(self._write, self._folder.student(n), folded))

    def _learn_grid(self, source: Path, steps: tuple[int, ...], halving: Halving) -> None:
        """Train the network in ``source`` on the last of ``steps``, rehearsing the others."""
        section, folder = self._recipe.stage_two, self._folder.shared(halving.steps)
        if self._stands(folder):
            return

        def begin() -> UNet2DConditionModel:
            network = load_stock(source)
            return network if takes_grid(network) else told_its_grid(network)

        grids = Grids.of(self._schedule, steps, halving.newest_share, self._device)
        anchor = self._processes.frozen(load_stock(self._folder.stage_one))
        snapshot = self._processes.frozen(begin())

        def loss(network: nn.Module, draws: Draws, update: int, batch: int) -> RowLoss:
            drawn = grids.draw(draws, update, batch)
            rows = self._noisy(draws, update, batch, grids.tables.t[drawn.point])
            w = self._weights(draws, update, batch, section.unguided_share)
            z_t, _ = self._tables.noisy(rows)
            target = grids.target(anchor, snapshot, z_t, rows, drawn, w)
            losses = target_loss(network, self._tables, z_t, rows, w, target, drawn.grid)
            return RowLoss(losses / (1 + w) ** section.w_power, w)

        self._phase(f"d{halving.steps}", section.training(halving), begin, loss, folder)

    def _write(self, folder: Path, network: UNet2DConditionModel) -> None:
        write_folder(folder, lambda staging: save_stock(staging, network, self._schedule, self._recipe.clip))

    def _phase(
        self,
        name: str,
        training: Training,
        start: Callable[[], UNet2DConditionModel],
        loss: Loss,
        folder: Path,
    ) -> None:
        """Train the network that ``start`` makes into ``folder``, unless that stands already."""
        if self._stands(folder):
            return
        network = start()
        weights, seconds = self._trainer.train(Phase(name, training, network, Draws(self._recipe.seed, name), loss))

        def fill(staging: Path) -> None:
            save_stock(staging, with_weights(network, weights), self._schedule, self._recipe.clip)
            record = {"name": name, "updates": training.updates, "seconds": round(seconds, 1)}
            (staging / "phase.json").write_text(json.dumps(record), encoding="utf-8")

        def keep() -> None:
            write_folder(folder, fill)
            shutil.rmtree(self._trainer.checkpoints / name)

        self._processes.first(keep)
        self._trainer.progress.console.log(f"{name}: {training.updates} updates in {seconds:.0f} s")

    def _stands(self, folder: Path) -> bool:
        """Whether a phase is finished."""
        return self._processes.first((folder / "phase.json").is_file)

    def _gate(self, teacher: nn.Module) -> None:
        """Refuse a stage-one student that is not yet the guided teacher: every halving inherits its error."""
        found = self.guidance_errors(self._processes.frozen(load_stock(self._folder.stage_one)), teacher)
        errors = self._processes.first(lambda: found)
        shown = ", ".join(f"{scale:g}: {error:.4f}" for scale, error in errors.items())
        self._trainer.progress.console.log(f"stage one, relative v-error by guidance_scale: {shown}")
        worst = max(errors, key=lambda scale: errors[scale])
        if not errors[worst] <= self._recipe.stage_one.max_relative_error:
            raise DivergedError(
                f"stage one misses its gate: relative v-error {errors[worst]:.4f} at guidance_scale {worst:g}, "
                f"allowed {self._recipe.stage_one.max_relative_error:g}; "
                "train it longer (stage_one.updates) in a new run folder"
            )
        passed = json.dumps({"relative_v_error": {f"{scale:g}": error for scale, error in errors.items()}})
        self._processes.first(lambda: write_text(self._folder.gate, passed + "\n"))

    @torch.inference_mode()
    def guidance_errors(self, student: nn.Module, teacher: nn.Module) -> dict[float, float]:
        """|v_student - v_guided|² / |v_guided|² on the same rows, by guidance_scale."""
        rows = self._noisy(Draws(self._recipe.seed, "gate"), 0, GATE_ROWS)
        z_t, _ = self._tables.noisy(rows)
        errors = {}
        for scale in torch.linspace(self._recipe.guidance.min, self._recipe.guidance.max, GATE_SCALES).tolist():
            w = torch.full((GATE_ROWS,), weight_from_scale(scale), device=self._device)
            target = guided_v(teacher, z_t, rows, w)
            error = predict(student, z_t, rows.t, rows.condition, w, rows.extra) - target
            errors[scale] = float(error.square().sum() / target.square().sum())
        return errors

    def _noisy(self, draws: Draws, update: int, batch: int, t: Tensor | None = None) -> Noisy:
        """The rows of an update; t: table indices, or uniform ones."""
        data = self._source.batch(draws, update, batch)
        if t is None:
            t = (draws.stratified(update, batch, Draw.TIME) * self._schedule.timesteps).long()
        noise = draws.normal(update, tuple(data.x.shape))
        return Noisy(data.x, data.condition, self._source.null(batch), noise, t, data.extra).to(self._device)

    def _weights(self, draws: Draws, update: int, batch: int, unguided_share: float) -> Tensor:
        """(B,) guidance weights, uniform over the range, with a share at its lowest exactly."""
        low, high = (weight_from_scale(s) for s in (self._recipe.guidance.min, self._recipe.guidance.max))
        u = draws.stratified(update, batch, Draw.GUIDANCE)
        spread = low + (high - low) * (u - unguided_share).clamp(min=0) / (1 - unguided_share)
        return spread.to(self._device, torch.float32)
