"""The report of a latent run: how near its students come to the teacher at equal noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distill_jobs.contenders import STUDENT, TEACHER
from distill_jobs.gates import Gate
from distill_jobs.inpainting import SEEING
from distill_jobs.report import RunReport
from distill_jobs.tables import gate_table
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
            f"{told.samples} prompts of the data a row and seed (seeds {', '.join(map(str, told.seeds))}), with "
            "the same initial noise for all models. Distance: root mean square difference of the final latents to "
            "the teacher's finest. Figures are means over seeds ± spread (largest - smallest).",
            "",
            f"Machine: {self.machine.processor}, {self.machine.cores} cores. "
            f"Trained in {sum(self.training_seconds.values()):.0f} s, measured in {self.seconds:.0f} s.",
            "",
            *gate_table(self.gates),
            "",
            "## Quality",
            "",
            self.quality(),
            "",
            *task_lines(self.tasks),
        ]
        return "\n".join(lines)

    def quality(self) -> str:
        lines = [
            "| guidance_scale | model | steps | evaluations | distance to the teacher |",
            "|---:|---|---:|---:|---:|",
        ]
        for row in sorted(self.evaluation.rows, key=lambda row: row.guidance_scale):
            found = row.metrics[DISTANCE]
            head = f"| {row.guidance_scale:g} | {row.model} | {row.steps} | {row.evaluations} |"
            lines.append(f"{head} {found.mean:.3f} ± {found.spread:.3f} |")
        return "\n".join(lines)


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
