"""What students do besides drawing from text, measured for the report: edits by inversion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.progress import Progress

from distill_jobs.classifier import DigitClassifier
from distill_jobs.contenders import STUDENT, TEACHER
from distill_jobs.data.digits import Digits
from distill_jobs.encoders import encoders
from distill_jobs.gates import Gate
from distill_jobs.inversion import AGREEMENT, INVERSION, RECONSTRUCTION, measure_inversion, write_edit_sheet
from distill_jobs.recipe import Recipe
from engines.manifest import EvaluationRow

LEAST_EDIT_AGREEMENT = 0.9
TaskRows = Mapping[str, tuple[EvaluationRow, ...]]
"""By task, the rows of its table."""


def measure_tasks(
    run_dir: Path, recipe: Recipe, classifier: DigitClassifier, digits: Digits, progress: Progress
) -> dict[str, tuple[EvaluationRow, ...]]:
    """The tables of the tasks that the run trained for, and their sheets. Raises: JobError."""
    tables = {}
    if recipe.encoder is not None:
        task = progress.add_task(INVERSION, total=None, loss="")
        tables[INVERSION] = measure_inversion(
            run_dir, recipe, classifier, digits, lambda done: progress.advance(task, done)
        )
        write_edit_sheet(run_dir / "sheets" / "edits.png", run_dir, recipe, digits)
    return tables


def task_weights(run_dir: Path, recipe: Recipe) -> dict[str, str]:
    """Hashes of the networks that only tasks use, by name."""
    return {encoder.key: encoder.weights_sha256() for encoder in encoders(run_dir, recipe)}


def task_gates(tables: TaskRows) -> tuple[Gate, ...]:
    """The targets that these rows can answer."""
    return tuple(_inversion_gates(tables.get(INVERSION, ())))


def _inversion_gates(rows: tuple[EvaluationRow, ...]) -> Iterator[Gate]:
    """Closer to the image than the teacher at equal evaluations; edits that are what they were asked to be."""
    by_key = {(row.model, row.steps): row.metrics for row in rows}
    for (model, steps), metrics in by_key.items():
        if model != STUDENT:
            continue
        teacher = by_key[TEACHER, steps][RECONSTRUCTION].mean
        ratio = metrics[RECONSTRUCTION].mean / max(teacher, 1e-12)
        yield Gate(name=f"{steps}-step encoder and student, reconstruction error / teacher's", value=ratio, limit=1)
        yield Gate(
            name=f"{steps}-step encoder and student, agreement of edits",
            value=metrics[AGREEMENT].mean,
            limit=LEAST_EDIT_AGREEMENT,
            at_least=True,
        )
