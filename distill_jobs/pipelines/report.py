"""The report of a latent run: how near its students come to the teacher at equal noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from distill_jobs.contenders import STUDENT, TEACHER
from distill_jobs.gates import Gate
from distill_jobs.report import JSON_NAME, MARKDOWN_NAME, Machine
from engines.manifest import Evaluation, EvaluationRow

DISTANCE = "paired_distance"


class LatentReport(BaseModel):
    """What an evaluation found, and how it was made. weights: sha256 of every network's weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str
    recipe_sha256: str
    command: str
    machine: Machine
    versions: dict[str, str]
    weights: dict[str, str]
    seconds: float
    training_seconds: dict[str, float]
    evaluation: Evaluation
    gates: tuple[Gate, ...]

    @classmethod
    def read(cls, run_dir: Path) -> LatentReport:
        return cls.model_validate_json((run_dir / JSON_NAME).read_bytes())

    def write(self, run_dir: Path) -> None:
        """Write report.json and report.md."""
        (run_dir / JSON_NAME).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (run_dir / MARKDOWN_NAME).write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        """The report for people."""
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
            "| target | value | limit | |",
            "|---|---:|---:|---|",
            *(f"| {g.name} | {g.value:.3f} | {g.limit:g} | {_verdict(g)} |" for g in self.gates),
            "",
            "| guidance_scale | model | steps | evaluations | distance to the teacher |",
            "|---:|---|---:|---:|---:|",
        ]
        for row in sorted(told.rows, key=lambda row: row.guidance_scale):
            found = row.metrics[DISTANCE]
            head = f"| {row.guidance_scale:g} | {row.model} | {row.steps} | {row.evaluations} |"
            lines.append(f"{head} {found.mean:.3f} ± {found.spread:.3f} |")
        return "\n".join([*lines, ""])


def _verdict(gate: Gate) -> str:
    return "pass" if gate.passed else "**FAIL**"


def distance_gates(rows: Sequence[EvaluationRow]) -> Iterator[Gate]:
    """A student must come nearer to the teacher's finest than the teacher does in as many steps."""
    by_key = {(row.model, row.steps, row.guidance_scale): row.metrics[DISTANCE].mean for row in rows}
    for (model, steps, scale), distance in by_key.items():
        undistilled = by_key.get((TEACHER, steps, scale))
        if model == STUDENT and undistilled:
            name = f"{steps}-step distance / teacher's in {steps} steps, guidance {scale:g}"
            yield Gate(name=name, value=distance / undistilled, limit=1.0)
