"""The report of a latent run: how near its students come to the teacher at equal noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distill_jobs.contenders import TEACHER
from distill_jobs.curves import picture_links
from distill_jobs.gates import EXPORTED, FRECHET, Gate, draws_afresh, title
from distill_jobs.inpainting import SEEING
from distill_jobs.report import RunReport
from distill_jobs.tables import gate_table, quality_table
from distill_jobs.task_tables import task_lines
from engines.manifest import EvaluationRow

DISTANCE = "paired_distance"


class LatentReport(RunReport):
    """Of a run whose teacher is a pipeline folder."""

    def markdown(self) -> str:
        """What was measured, the gates, the tables."""
        told = self.evaluation
        lines = [
            f"# Evaluation of {self.recipe}",
            "",
            f"{told.samples} prompts a row and seed (seeds {', '.join(map(str, told.seeds))}), with "
            "the same initial noise for all models. Figures are means over seeds ± spread (largest - smallest).",
            "",
            f"Machine: {self.machine.processor}, {self.machine.cores} cores. "
            f"Trained in {sum(self.training_seconds.values()):.0f} s, measured in {self.seconds:.0f} s.",
            "",
            *self.legend(),
            "",
            *gate_table(self.gates),
            "",
            *quality_table(self.evaluation.rows),
            "",
            *picture_links(self.evaluation.rows),
            "",
            *task_lines(self.tasks),
        ]
        return "\n".join(lines)

    def quality(self) -> str:
        return "\n".join(quality_table(self.evaluation.rows)[2:])

    def legend(self) -> list[str]:
        distance = (
            "Distance to the teacher: root mean square difference of the final latents to those of the teacher's "
            "finest, at equal noise. Evaluations: of the network, an image; a guided teacher step counts two."
        )
        if not any("frechet_distance" in row.metrics for row in self.evaluation.rows):
            return [distance]
        return [
            distance,
            "",
            f"{self.evaluation.metric}; lower is better, and only equal numbers of images compare. Precision: "
            "share of pictures inside the manifold of the data's images; recall: share of those inside that of the "
            "pictures; coverage: share of those with a picture near them. Text agreement: mean cosine of CLIP's "
            "embeddings of a picture and of its prompt. Higher is better.",
        ]


def distance_gates(rows: Sequence[EvaluationRow], metric: str = DISTANCE) -> Iterator[Gate]:
    """A student must come nearer to the teacher's finest than the teacher does in as many steps.

    Not one that draws fresh noise between its steps: its images are others by design.
    """
    undistilled = _undistilled(rows)
    for row in rows:
        teacher = undistilled.get((row.steps, row.guidance_scale))
        if row.model in (*EXPORTED, SEEING) and teacher is not None and not draws_afresh(row):
            what = "distance within masks" if row.model == SEEING else "distance"
            yield _over_teacher(row, teacher, what, metric)


def fresh_gates(rows: Sequence[EvaluationRow], pictures: Sequence[EvaluationRow]) -> Iterator[Gate]:
    """Students that draw fresh noise between their steps, by the Fréchet distance of their pictures.

    pictures: rows that have it, of the same contenders; a student of which there is none has nobody to judge it.
    """
    undistilled = _undistilled(pictures)
    judged = {(row.model, row.steps, row.guidance_scale): row for row in pictures if FRECHET in row.metrics}
    for row in rows:
        if row.model not in EXPORTED or not draws_afresh(row):
            continue
        found = judged.get((row.model, row.steps, row.guidance_scale))
        if found is None:
            name = f"{title(row)} pictures are judged (evaluation.features), guidance {row.guidance_scale:g}"
            yield Gate(name=name, value=0, limit=1, at_least=True)
        elif (teacher := undistilled.get((row.steps, row.guidance_scale))) is not None:
            yield _over_teacher(found, teacher, "Fréchet distance", FRECHET)


def _undistilled(rows: Sequence[EvaluationRow]) -> dict[tuple[int, float], EvaluationRow]:
    """The teacher's rows, by steps and guidance."""
    return {(row.steps, row.guidance_scale): row for row in rows if row.model == TEACHER}


def _over_teacher(row: EvaluationRow, teacher: EvaluationRow, what: str, metric: str) -> Gate:
    name = f"{title(row)} {what} / teacher's in {row.steps} steps, guidance {row.guidance_scale:g}"
    return Gate(name=name, value=row.metrics[metric].mean / max(teacher.metrics[metric].mean, 1e-12), limit=1.0)
