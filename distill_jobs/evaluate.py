"""Quality of a finished run: every contender × guidance × seed, into a report with its tables and sheets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from distill_jobs.cells import METRICS, Cell, CellResult, Judge
from distill_jobs.choices import choices
from distill_jobs.classifier import accuracy, classifier_of, split_digits
from distill_jobs.contenders import Contender, contenders
from distill_jobs.curves import write_curves
from distill_jobs.data.digits import Digits
from distill_jobs.features import feature_space
from distill_jobs.gates import gates
from distill_jobs.recipe import Recipe
from distill_jobs.report import Report, Timing
from distill_jobs.run_folder import RunFolder
from distill_jobs.sheets import write_sheets
from distill_jobs.tasks import measure_tasks, task_gates, weights_of
from engines.manifest import Evaluation, EvaluationRow


def evaluate_run(
    run_dir: Path,
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    command: str = "",
    compiled: bool = False,
    lenders: Sequence[Path] = (),
) -> Report:
    """Measure a finished run and write report.json, report.md, curves/ and sheets/ into it.

    progress: a started display to add a task to, or None. command: how the report says it was made.
    compiled: run the networks through torch.compile, twice as fast on a CPU; needs a C++ compiler.
    lenders: other run folders; their results for equal networks, counts and seeds are taken instead of measured.
    An interrupted evaluation goes on where it stopped. Raises: JobError when a network is missing.
    """
    everyone, digits, settings = contenders(run_dir, recipe), Digits.load(), recipe.evaluation
    judge = judge_of(run_dir, recipe, everyone[0], digits, lenders)
    started, display = time.monotonic(), progress or Progress(disable=True)
    results = _measure_all(judge, everyone, display, compiled)
    tasks = measure_tasks(run_dir, recipe, judge.classifier, digits, display)
    evaluation, finest = _evaluation(judge, everyone, results), settings.teacher_steps
    rows = evaluation.rows
    report = Report.made(
        run_dir,
        recipe,
        command=command,
        weights=weights_of(run_dir, recipe, everyone),
        features="" if settings.features_path is None else judge.space.identity,
        seconds=time.monotonic() - started,
        classifier_accuracy=accuracy(judge.classifier, split_digits(digits)[1]),
        timings=tuple(Timing(cell=cell.key, seconds=result.seconds) for cell, result in results.items()),
        evaluation=evaluation,
        tasks=tasks,
        gates=(*gates(rows, finest), *task_gates(tasks)),
        choices=choices(rows, finest),
    )
    write_curves(run_dir, rows, finest)
    write_sheets(run_dir / "sheets", recipe, everyone)
    report.write(run_dir)
    return report


def measure_teachers(
    run_dir: Path, recipe: Recipe, teachers: Sequence[Contender], progress: Progress, lenders: Sequence[Path] = ()
) -> Evaluation:
    """Rows of finished teachers, distances to the first; no student has to stand. Raises: JobError."""
    judge = judge_of(run_dir, recipe, teachers[0], Digits.load(), lenders)
    return _evaluation(judge, teachers, _measure_all(judge, teachers, progress, compiled=False))


def judge_of(run_dir: Path, recipe: Recipe, reference: Contender, digits: Digits, lenders: Sequence[Path]) -> Judge:
    """What measures the cells of a run: its classifier, trained on first use, and features of the real digits."""
    classifier = classifier_of(run_dir, digits, lenders)
    space = feature_space(recipe.evaluation, classifier)
    return Judge(
        folder=RunFolder(run_dir).evaluation,
        recipe=recipe,
        classifier=classifier,
        space=space,
        real=space.of(digits.images),
        reference=reference,
        lenders=tuple(RunFolder(lender).evaluation for lender in lenders),
    )


def _measure_all(
    judge: Judge, everyone: Sequence[Contender], progress: Progress, compiled: bool
) -> dict[Cell, CellResult]:
    """Every cell's result; one network is in memory at a time, the reference's cells come first."""
    settings = judge.recipe.evaluation
    results: dict[Cell, CellResult] = {}
    waiting: list[Cell] = []
    for contender in everyone:
        for cell in (Cell(contender, g, seed) for g in contender.scales_of(settings) for seed in settings.seeds):
            if (result := judge.known(cell)) is None:
                waiting.append(cell)
            else:
                results[cell] = result
    work = settings.samples * sum(cell.contender.evaluations(cell.guidance_scale) for cell in waiting)
    task = progress.add_task("evaluate", total=work, loss="")
    for contender in everyone:
        own = [cell for cell in waiting if cell.contender == contender]
        unet = contender.load() if own else None
        if compiled and unet is not None:
            unet.compile(dynamic=False)
        for cell in own:
            progress.update(task, description=cell.key)
            network = contender.network(unet, cell.guidance_scale)
            results[cell] = judge.measure(cell, network, lambda done: progress.advance(task, done))
    return results


def _evaluation(judge: Judge, everyone: Sequence[Contender], results: dict[Cell, CellResult]) -> Evaluation:
    recipe, settings = judge.recipe, judge.recipe.evaluation
    rows = tuple(row_of(recipe, c, scale, results) for c in everyone for scale in c.scales_of(settings))
    return Evaluation(metric=judge.space.metric, samples=settings.samples, seeds=settings.seeds, rows=rows)


def row_of(recipe: Recipe, contender: Contender, scale: float, results: dict[Cell, CellResult]) -> EvaluationRow:
    """A contender's line at one guidance scale, from its cells of all seeds."""
    per_seed = [results[Cell(contender, scale, seed)].metrics for seed in recipe.evaluation.seeds]
    values = {name: [metrics[name] for metrics in per_seed] for name in METRICS}
    return contender.row(scale, values)
