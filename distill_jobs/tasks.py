"""What students do besides drawing from text, measured for the report: inpainting, and edits by inversion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.progress import Progress

from distill_jobs.classifier import DigitClassifier
from distill_jobs.contenders import STUDENT, TEACHER, Contender
from distill_jobs.data.digits import Digits
from distill_jobs.encoders import Encoder, encoders
from distill_jobs.gates import Gate
from distill_jobs.inpainting import AGREEMENT as IN_MASK
from distill_jobs.inpainting import INPAINTING, measure_inpainting, write_inpainting_sheet
from distill_jobs.inpainting import TEXT_AGREEMENT as FROM_TEXT
from distill_jobs.inversion import AGREEMENT, INVERSION, RECONSTRUCTION, measure_inversion, write_edit_sheet
from distill_jobs.recipe import Recipe
from distill_jobs.run_folder import RunFolder
from distill_jobs.student import weights_sha256
from engines.manifest import EvaluationRow

LEAST_EDIT_AGREEMENT = 0.9
LEAST_INPAINT_AGREEMENT = 0.95
TaskRows = Mapping[str, tuple[EvaluationRow, ...]]
"""By task, the rows of its table."""


def measure_tasks(
    run_dir: Path, recipe: Recipe, classifier: DigitClassifier, digits: Digits, progress: Progress
) -> dict[str, tuple[EvaluationRow, ...]]:
    """The tables of the tasks that the run trained for, and their sheets. Raises: JobError."""
    task = progress.add_task(INPAINTING, total=None, loss="")

    def advance(done: int) -> None:
        progress.advance(task, done)

    tables = {INPAINTING: measure_inpainting(run_dir, recipe, classifier, digits, advance)}
    write_inpainting_sheet(run_dir / "sheets" / "inpainting.png", run_dir, recipe, digits)
    if recipe.encoder is not None:
        progress.update(task, description=INVERSION)
        tables[INVERSION] = measure_inversion(run_dir, recipe, classifier, digits, advance)
        write_edit_sheet(run_dir / "sheets" / "edits.png", run_dir, recipe, digits)
    return tables


def weights_of(run_dir: Path, recipe: Recipe, everyone: Sequence[Contender]) -> dict[str, str]:
    """Hashes of all networks that an evaluation is of, by name: the contenders', and those that only tasks use."""
    networks: list[Contender | Encoder] = [*everyone, *encoders(run_dir, recipe)]
    hashes = {network.key: network.weights_sha256() for network in networks}
    return (
        hashes if recipe.decoder is None else {**hashes, "decoder": weights_sha256(RunFolder(run_dir).decoder, "")}
    )


def task_gates(tables: TaskRows) -> tuple[Gate, ...]:
    """The targets that these rows can answer."""
    inpainted, inverted = tables.get(INPAINTING, ()), tables.get(INVERSION, ())
    return (*_inpainting_gates(inpainted), *inversion_gates(inverted))


def _inpainting_gates(rows: tuple[EvaluationRow, ...]) -> Iterator[Gate]:
    """As obedient within a mask as on an empty page."""
    for row in rows:
        ratio = row.metrics[IN_MASK].mean / max(row.metrics[FROM_TEXT].mean, 1e-12)
        name = f"inpainting, {row.steps}-step {row.model}, agreement / from text alone"
        yield Gate(name=name, value=ratio, limit=LEAST_INPAINT_AGREEMENT, at_least=True)


def inversion_gates(rows: Sequence[EvaluationRow]) -> Iterator[Gate]:
    """Closer to the image than the teacher at equal evaluations; edits, where measured, that are what was asked."""
    by_key = {(row.model, row.steps): row.metrics for row in rows}
    for (model, steps), metrics in by_key.items():
        if model != STUDENT:
            continue
        teacher = by_key[TEACHER, steps][RECONSTRUCTION].mean
        ratio = metrics[RECONSTRUCTION].mean / max(teacher, 1e-12)
        yield Gate(name=f"{steps}-step encoder and student, reconstruction error / teacher's", value=ratio, limit=1)
        if AGREEMENT in metrics:
            yield Gate(
                name=f"{steps}-step encoder and student, agreement of edits",
                value=metrics[AGREEMENT].mean,
                limit=LEAST_EDIT_AGREEMENT,
                at_least=True,
            )
