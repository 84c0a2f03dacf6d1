"""The job: teacher, stage one, its gate, halvings, consistency, encoders, each kept as a stock diffusers folder.

A finished phase is a finished folder; a resumed job skips those and goes on from the newest checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from distill_jobs.data.open import latents_of, open_source
from distill_jobs.data.source import Source
from distill_jobs.errors import RecipeError
from distill_jobs.finish import train_consistency
from distill_jobs.latent_sections import FolderTeacher
from distill_jobs.loop import Trainer
from distill_jobs.making.pipeline import made_teacher
from distill_jobs.phases import Phases
from distill_jobs.pipelines.teacher import open_teacher
from distill_jobs.pipelines.tiny_decoder import train_decoder
from distill_jobs.processes import Processes
from distill_jobs.recipe import Recipe
from distill_jobs.run_folder import Machine, RunFolder, stored_recipe
from distill_jobs.sections import ChainSection, Section, Training
from distill_jobs.signals import StopSignal, stop_with_launcher
from distill_jobs.stage_one import probe_teacher, train_stage_one, train_teacher
from distill_jobs.stage_two import train_encoders, train_stage_two
from distill_jobs.student import weights_sha256
from distill_jobs.taken import take_phases


def run_job(
    recipe: Recipe, out: Path, *, resume: bool, progress: Progress, taken_from: Path | None = None
) -> RunFolder:
    """Train everything the recipe asks for into ``out``, alone or as one of several processes.

    taken_from: another run folder, whose finished phases are copied where the recipes say they would be the same.
    Raises: RecipeError when the folder holds another recipe's run; LockedError; Interrupted; DivergedError;
    StorageError.
    """
    folder = RunFolder(out)
    if taken_from is not None:
        _check_source(taken_from, folder)
    processes = Processes(recipe.compute, out)
    processes.first(lambda: _check_shares(recipe, processes.count))  # else one ends while the others still connect
    with StopSignal().listening() as stop, ExitStack() as held:
        if processes.count > 1:
            stop_with_launcher()
        if not processes.is_first:
            progress = Progress(console=Console(quiet=True), disable=True)
        held.callback(processes.accelerator.end_training)

        def take_up(here: Machine) -> Machine:
            held.enter_context(folder.locked())
            return _take_up(recipe, folder, here, resume, taken_from, progress)

        _set_up(processes, take_up, progress)
        every, log_every = recipe.checkpoint_every, recipe.log_every
        trainer = Trainer(processes, out / "checkpoints", every, log_every, stop, progress)
        teacher = made_teacher(recipe, folder, trainer) or open_teacher(recipe)

        def begun(source: Source) -> Phases:
            return Phases(recipe, folder, trainer, source, teacher)

        def probe(few: Source) -> None:
            probe_teacher(begun(few))

        probed = isinstance(recipe.teacher, FolderTeacher) and not processes.first((folder.teacher / "unet").is_dir)
        source = open_source(recipe, teacher, processes, progress, stop, probe if probed else None)
        if (latents := latents_of(source)) is not None:
            processes.first(lambda: folder.keep_data(folder.data, latents.cache.identity, len(latents.cache)))
        _train(begun(source))
        processes.first(lambda: shutil.rmtree(trainer.checkpoints, ignore_errors=True))
    return folder


def _take_up(
    recipe: Recipe, folder: RunFolder, here: Machine, resume: bool, taken_from: Path | None, progress: Progress
) -> Machine:
    """Start the run or go on with it, in the first process alone: the machine it was started on."""
    folder.take_up(recipe, resume)
    started = folder.started_on(here)
    for caution in recipe.cautions:
        progress.console.log(caution)
    if taken_from is not None:
        for line in take_phases(recipe, RunFolder(taken_from), folder):
            progress.console.log(line)
    return started


def _set_up(processes: Processes, take_up: Callable[[Machine], Machine], progress: Progress) -> None:
    """As on the machine the run was started on, so that a resume ends in the same bytes."""
    here = Machine.here(processes.count, processes.device)
    started = processes.first(lambda: take_up(here))
    torch.set_num_threads(started.threads)
    if changed := replace(started, threads=here.threads).differences(here):
        progress.console.log(f"the last bits may differ from an uninterrupted run's: {'; '.join(changed)}")
    processes.accelerator.init_trackers("tensorboard")


def _train(phases: Phases) -> None:
    """All phases that the recipe asks for, those already finished skipped."""
    train_teacher(phases)
    phases.processes.first(lambda: phases.folder.check_teacher(weights_sha256(phases.folder.teacher)))
    if phases.recipe.stage_two.guidance != "at_sampling":  # else nothing is made of it
        train_stage_one(phases)
    train_stage_two(phases)
    train_consistency(phases)
    train_encoders(phases)
    train_decoder(phases)


def _check_shares(section: Section, processes: int, name: str = "") -> None:
    """Refuse batches that so many processes cannot share before any phase starts. Raises: RecipeError."""
    for field, value in section:
        if not isinstance(value, Section):
            continue
        if isinstance(value, Training | ChainSection) and value.batch_size % (processes * value.accumulate):
            raise RecipeError(
                f"{name}{field}.batch_size {value.batch_size} cannot be shared equally by {processes} processes × "
                f"{value.accumulate} micro-batches (accumulate)"
            )
        _check_shares(value, processes, f"{name}{field}.")


def _check_source(taken_from: Path, folder: RunFolder) -> None:
    """Refuse a wrong source of phases before anything is written."""
    stored_recipe(RunFolder(taken_from))
    if taken_from.resolve() == folder.path.resolve():
        raise RecipeError(f"{taken_from} is the run folder itself; give another run's to take phases from")
