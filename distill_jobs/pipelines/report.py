"""The report of a latent run: how near its students come to the teacher at equal noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distill_jobs.contenders import STUDENT, TEACHER
from distill_jobs.curves import picture_links
from distill_jobs.gates import Gate
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
    undistilled = {(r.steps, r.guidance_scale): r.metrics[metric].mean for r in rows if r.model == TEACHER}
    for row in rows:
        limit = undistilled.get((row.steps, row.guidance_scale))
        fresh = row.sampler != "deterministic" and row.steps > 1
        if row.model in (STUDENT, SEEING) and limit and not fresh:
            what = "distance" if row.model == STUDENT else "distance within masks"
            name = f"{row.steps}-step {what} / teacher's in {row.steps} steps, guidance {row.guidance_scale:g}"
            yield Gate(name=name, value=row.metrics[metric].mean / limit, limit=1.0)
