"""Rows and reports of evaluations that never ran."""

from __future__ import annotations

from pathlib import Path

from distill_jobs.cells import METRICS
from distill_jobs.latent_sections import LatentTeacher
from distill_jobs.pipelines.report import LatentReport
from distill_jobs.recipe import Recipe
from distill_jobs.report import Machine, Report, RunReport
from engines.manifest import Evaluation, EvaluationRow, Measured
from engines.sampler import Sampler


def quality(
    model: str,
    steps: int,
    scale: float,
    *,
    distance: float = 1.0,
    agreement: float = 0.99,
    paired: float = 0.1,
    sampler: Sampler = "deterministic",
) -> EvaluationRow:
    values = dict.fromkeys(METRICS, 0.5) | {
        "frechet_distance": distance,
        "class_agreement": agreement,
        "paired_distance": paired,
    }
    metrics = {name: Measured(mean=value, spread=0) for name, value in values.items()}
    evaluations = steps * (2 if model.startswith("teacher") and scale != 1 else 1)
    return EvaluationRow(
        model=model, steps=steps, evaluations=evaluations, sampler=sampler, guidance_scale=scale, metrics=metrics
    )


def write_evaluated(
    folder: Path,
    recipe: Recipe,
    rows: tuple[EvaluationRow, ...],
    teacher: str = "t",
    tasks: dict[str, tuple[EvaluationRow, ...]] | None = None,
) -> Path:
    """A run folder with a recipe and a report alone. teacher: stands for its weights."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    settings = recipe.evaluation
    latent = isinstance(recipe.teacher, LatentTeacher)
    kind: type[RunReport] = LatentReport if latent else Report
    own = {} if latent else {"classifier_accuracy": 0.99, "timings": ()}
    report = kind(
        recipe=recipe.name,
        recipe_sha256=recipe.sha256(),
        evaluated_sha256=recipe.evaluated_sha256(),
        command="",
        machine=Machine(system="", processor="", cores=1, memory_gib=1),
        versions={},
        weights={f"teacher-{settings.teacher_steps}": teacher},
        seconds=0,
        training_seconds={},
        evaluation=Evaluation(metric="distance", samples=settings.samples, seeds=settings.seeds, rows=rows),
        tasks=tasks or {},
        gates=(),
        **own,
    )
    report.write(folder)
    return folder
