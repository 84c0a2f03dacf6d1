"""The job: teacher → stage one → its gate → the halvings, each phase kept as a stock diffusers folder.

A finished phase is a finished folder; a resumed job skips those and goes on from the newest checkpoint.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from rich.progress import Progress
from torch import Tensor

from distill_jobs.checkpoint import write_folder
from distill_jobs.data.open import open_source
from distill_jobs.data.source import Source
from distill_jobs.draws import Draw, Draws
from distill_jobs.errors import DivergedError, LockedError, RecipeError
from distill_jobs.loop import Phase, RowLoss, StopSignal, Trainer
from distill_jobs.objectives import (
    HalvingTables,
    Noisy,
    Tables,
    guided_v,
    halving_loss,
    stage_one_loss,
    teacher_loss,
)
from distill_jobs.recipe import Halving, Recipe, changed_fields, read_recipe
from distill_jobs.student import load_stock, new_teacher, predict, save_stock, student_of
from engines.guidance import weight_from_scale
from engines.schedule import NoiseSchedule

GATE_ROWS = 512
GATE_SCALES = 5


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what it makes."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def teacher(self) -> Path:
        return self.path / "teacher"

    @property
    def stage_one(self) -> Path:
        return self.path / "stage_one"

    def student(self, steps: int) -> Path:
        return self.path / "students" / f"d{steps}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder alone. Raises: LockedError when another job has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise LockedError(
                    f"another job works in {self.path}; wait for it or choose another --out"
                ) from None
            yield


def run_job(recipe: Recipe, out: Path, *, resume: bool, progress: Progress) -> RunFolder:
    """Train everything the recipe asks for into ``out``.

    Raises: RecipeError when the folder holds another recipe's run; LockedError; Interrupted; DivergedError.
    """
    folder = RunFolder(out)
    with folder.locked(), StopSignal().listening() as stop:
        _take_up(folder, recipe, resume)
        accelerator = Accelerator(log_with="tensorboard", project_dir=str(out))
        accelerator.init_trackers("tensorboard")
        trainer = Trainer(accelerator, out / "checkpoints", recipe.checkpoint_every, stop, progress)
        _Job(recipe, folder, trainer, open_source(recipe)).run()
        accelerator.end_training()
    return folder


def stored_recipe(folder: RunFolder) -> Recipe:
    """The recipe a run folder was made with. Raises: RecipeError when there is none."""
    if not folder.recipe.is_file():
        raise RecipeError(f"{folder.path} is not a run folder: it has no recipe.yaml")
    return read_recipe(folder.recipe)


def training_seconds(folder: RunFolder) -> dict[str, float]:
    """Seconds of training by finished phase."""
    files = sorted(folder.path.glob("**/phase.json"))
    phases = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {phase["name"]: phase["seconds"] for phase in phases}


def _take_up(folder: RunFolder, recipe: Recipe, resume: bool) -> None:
    if not folder.recipe.is_file():
        staged = folder.recipe.with_name(".recipe.yaml.writing")
        staged.write_text(recipe.to_yaml(), encoding="utf-8")
        staged.replace(folder.recipe)
        return
    if not resume:
        raise RecipeError(f"{folder.path} already holds a run; go on with --resume or choose another --out")
    if changed := changed_fields(stored_recipe(folder), recipe):
        raise RecipeError(f"the recipe differs from the one {folder.path} was started with: {', '.join(changed)}")


class _Job:
    """The phases of one recipe on one source of data."""

    def __init__(self, recipe: Recipe, folder: RunFolder, trainer: Trainer, source: Source) -> None:
        self._recipe, self._folder, self._trainer, self._source = recipe, folder, trainer, source
        self._schedule = NoiseSchedule(recipe.schedule)
        self._tables = Tables.of(self._schedule)
        self._device = trainer.accelerator.device

    def run(self) -> None:
        teacher = self._teacher()
        student = self._stage_one(teacher)
        for halving in self._recipe.stage_two.halvings:
            student = self._halve(student, halving)

    def _teacher(self) -> UNet2DConditionModel:
        recipe, section = self._recipe, self._recipe.teacher
        draws = Draws(recipe.seed, "teacher")

        def loss(network: UNet2DConditionModel, update: int) -> RowLoss:
            rows = self._noisy(draws, update, section.batch_size)
            dropped = draws.uniform(update, section.batch_size, Draw.DROPOUT) < section.condition_dropout
            return RowLoss(teacher_loss(network, self._tables, rows, dropped))

        network = new_teacher(recipe.unet, recipe.seed)
        return self._phase(Phase("teacher", section, network, loss), self._folder.teacher)

    def _stage_one(self, teacher: UNet2DConditionModel) -> UNet2DConditionModel:
        section = self._recipe.stage_one
        draws = Draws(self._recipe.seed, "stage_one")

        def loss(network: UNet2DConditionModel, update: int) -> RowLoss:
            rows = self._noisy(draws, update, section.batch_size)
            w = self._weights(draws, update, section.batch_size, section.unguided_share)
            return RowLoss(stage_one_loss(network, teacher, self._tables, rows, w) / (1 + w) ** section.w_power, w)

        student = self._phase(Phase("stage_one", section, student_of(teacher), loss), self._folder.stage_one)
        self._gate(student, teacher)
        return student

    def _halve(self, teacher: UNet2DConditionModel, halving: Halving) -> UNet2DConditionModel:
        section, n = self._recipe.stage_two, halving.steps
        draws = Draws(self._recipe.seed, f"d{n}")
        halves = HalvingTables.of(self._schedule, n)

        def loss(network: UNet2DConditionModel, update: int) -> RowLoss:
            batch = section.batch_size
            point = (draws.stratified(update, batch, Draw.TIME) * n).long()
            rows = self._noisy(draws, update, batch, halves.t[point])
            w = self._weights(draws, update, batch, section.unguided_share)
            losses = halving_loss(network, teacher, self._tables, halves, rows, point, w)
            return RowLoss(losses / (1 + w) ** section.w_power, w)

        return self._phase(Phase(f"d{n}", section.training(halving), _copy(teacher), loss), self._folder.student(n))

    def _phase(self, phase: Phase, folder: Path) -> UNet2DConditionModel:
        """The finished network of a phase: loaded where its folder stands, trained and saved where not."""
        if (folder / "phase.json").is_file():
            return load_stock(folder)
        seconds = self._trainer.train(phase)

        def fill(staging: Path) -> None:
            save_stock(staging, phase.network, self._schedule, self._recipe.clip)
            record = {"name": phase.name, "updates": phase.training.updates, "seconds": round(seconds, 1)}
            (staging / "phase.json").write_text(json.dumps(record), encoding="utf-8")

        folder.parent.mkdir(parents=True, exist_ok=True)
        write_folder(folder, fill)
        self._trainer.progress.console.log(f"{phase.name}: {phase.training.updates} updates in {seconds:.0f} s")
        return phase.network.requires_grad_(False)

    def _gate(self, student: UNet2DConditionModel, teacher: UNet2DConditionModel) -> None:
        """Refuse a stage-one student that is not yet the guided teacher: every halving inherits its error."""
        errors = self.guidance_errors(student, teacher)
        shown = ", ".join(f"{scale:g}: {error:.4f}" for scale, error in errors.items())
        self._trainer.progress.console.log(f"stage one, relative v-error by guidance_scale: {shown}")
        worst = max(errors, key=lambda scale: errors[scale])
        if not errors[worst] <= self._recipe.stage_one.max_relative_error:
            raise DivergedError(
                f"stage one misses its gate: relative v-error {errors[worst]:.4f} at guidance_scale {worst:g}, "
                f"allowed {self._recipe.stage_one.max_relative_error:g}; "
                "train it longer (stage_one.updates) in a new run folder"
            )

    @torch.inference_mode()
    def guidance_errors(self, student: UNet2DConditionModel, teacher: UNet2DConditionModel) -> dict[float, float]:
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


def _copy(network: UNet2DConditionModel) -> UNet2DConditionModel:
    twin = UNet2DConditionModel.from_config(network.config)
    twin.load_state_dict(network.state_dict())
    return twin
