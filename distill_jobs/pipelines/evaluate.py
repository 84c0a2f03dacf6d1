"""Quality of a latent run: teacher and students from the same noise and prompts, compared in latents."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import Progress, TaskID
from torch import Tensor

from distill_jobs.contenders import Contender, contenders
from distill_jobs.data.open import open_source
from distill_jobs.data.source import Condition, Source
from distill_jobs.draws import Draws
from distill_jobs.errors import JobError
from distill_jobs.pipelines.checks import open_folder
from distill_jobs.pipelines.packing import whole_image
from distill_jobs.pipelines.report import DISTANCE, LatentReport, distance_gates
from distill_jobs.processes import Processes
from distill_jobs.recipe import Recipe
from distill_jobs.report import machine, versions
from distill_jobs.run_folder import RunFolder, training_seconds
from distill_jobs.sampling import Network
from distill_jobs.sections import ComputeSection
from distill_jobs.tasks import task_weights
from engines.manifest import Evaluation, EvaluationRow, Measured

METRIC = "none: latents are compared with the teacher's, at equal noise"
SEED_STRIDE = 1_000_000


def evaluate_latent_run(run_dir: Path, recipe: Recipe, *, progress: Progress, command: str = "") -> LatentReport:
    """Measure a finished run, write report.json and report.md into it.

    Prompts are captions of the data; a device other than the CPU is used where there is one.
    Raises: JobError when a network is missing or gives no numbers; DataError.
    """
    if recipe.inpainting is not None:
        raise JobError("networks for inpainting are evaluated on digits only; their folders draw in diffusers")
    started, everyone = time.monotonic(), contenders(run_dir, recipe)
    rows = _Measuring(run_dir, recipe, progress).rows(everyone)
    settings = recipe.evaluation
    report = LatentReport(
        recipe=recipe.name,
        recipe_sha256=recipe.sha256(),
        command=command,
        machine=machine(),
        versions=versions(),
        weights={c.key: c.weights_sha256() for c in everyone} | task_weights(run_dir, recipe),
        seconds=time.monotonic() - started,
        training_seconds=training_seconds(RunFolder(run_dir)),
        evaluation=Evaluation(metric=METRIC, samples=settings.samples, seeds=settings.seeds, rows=rows),
        gates=tuple(distance_gates(rows)),
    )
    report.write(run_dir)
    return report


class _Measuring:
    """The prompts and the empty condition, on the device, and what the reference drew with them."""

    def __init__(self, run_dir: Path, recipe: Recipe, progress: Progress) -> None:
        processes, teacher = Processes(ComputeSection(), run_dir), open_folder(RunFolder(run_dir).teacher)
        source = open_source(recipe, teacher, processes, progress)
        self._recipe, self._device, self._progress = recipe, processes.device, progress
        self._null = source.null(1).to(self._device)
        self._prompts = _prompts(source, recipe, teacher.size_px)
        self._drawn: dict[tuple[float, int], Tensor] = {}

    def rows(self, everyone: Sequence[Contender]) -> tuple[EvaluationRow, ...]:
        """A row for each contender and guidance scale; the first contender is the reference."""
        settings = self._recipe.evaluation
        task = self._progress.add_task(
            "evaluate", total=len(everyone) * len(settings.guidance_scales) * len(settings.seeds), loss=""
        )
        return tuple(row for contender in everyone for row in self._of(contender, task))

    def _of(self, contender: Contender, task: TaskID) -> list[EvaluationRow]:
        unet, settings, rows = contender.load().to(self._device), self._recipe.evaluation, []
        for scale in contender.scales_of(settings):
            network, distances = contender.network(unet, scale, null=self._null), []
            for seed in settings.seeds:
                drawn = self._draw(contender, network, seed)
                reference = self._drawn.setdefault((scale, seed), drawn)
                distances.append(float((drawn - reference).square().mean().sqrt()))
                self._progress.advance(task)
            spread = max(distances) - min(distances)
            found = {DISTANCE: Measured(mean=sum(distances) / len(distances), spread=spread)}
            rows.append(
                EvaluationRow(
                    model=contender.title,
                    steps=contender.steps,
                    evaluations=contender.evaluations,
                    sampler=contender.sampler,
                    guidance_scale=scale,
                    metrics=found,
                )
            )
        return rows

    def _draw(self, contender: Contender, network: Network, seed: int) -> Tensor:
        """(samples, C, h, w) latents."""

        def on_device(x_t: Tensor, timestep: int, condition: Condition) -> Tensor:
            return network(x_t.to(self._device), timestep, condition.to(self._device)).cpu()

        batches, size = [], self._recipe.evaluation.batch_size
        for first in range(0, len(self._prompts), size):
            condition = self._prompts[first : first + size]
            begin = seed * SEED_STRIDE + first
            batches.append(contender.draw(on_device, self._recipe, condition, range(begin, begin + len(condition))))
        drawn = torch.cat(batches)
        if not torch.isfinite(drawn).all():
            raise JobError(f"{contender.key}: the network gives NaN or infinity; train it again")
        return drawn


def _prompts(source: Source, recipe: Recipe, side_px: int) -> Condition:
    """Conditions of captions, framed as whole images."""
    samples, size = recipe.evaluation.samples, recipe.evaluation.batch_size
    draws = Draws(recipe.seed, "evaluation")
    batches = [source.batch(draws, update, size).condition for update in range(-(-samples // size))]
    told = Condition.cat(batches)[:samples]
    if told.time_ids is None:
        return told
    return Condition(told.tokens, told.pooled, whole_image(side_px).expand(samples, 6))
