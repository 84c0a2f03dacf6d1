"""The tables of a report, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from distill_jobs.choices import Choice, titled
from distill_jobs.gates import AGREEMENT_SLACK, Gate
from engines.manifest import EvaluationRow, Measured

COLUMNS = {
    "frechet_distance": "Fréchet distance",
    "class_agreement": "class agreement",
    "text_agreement": "text agreement",
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "paired_distance": "distance to the teacher",
}


def legend(metric: str, classifier_accuracy: float) -> list[str]:
    """What the columns of the quality table are."""
    return [
        f"- Fréchet distance: {metric}, to all real digits; lower is better. Not FID.",
        f"- Class agreement: share of images that the classifier (held-out accuracy {classifier_accuracy:.4f}) "
        "takes for the prompted class.",
        "- Precision: share of samples inside the real images' manifold; recall: share of real images inside the "
        "samples' (3 nearest neighbours); coverage: share of real images with a sample nearer than their 5th "
        "neighbour. Higher is better; recall and coverage fall when variety is lost.",
        "- Distance to the teacher: RMS pixel difference, in the range -1 … 1, from the teacher's finest images at "
        "equal noise.",
        "- Evaluations: network evaluations an image; a guided teacher step counts two.",
    ]


def gate_table(found: Sequence[Gate]) -> list[str]:
    lines = ["## Gates", "", "| target | value | limit | |", "|---|---:|---:|---|"]
    for gate in found:
        bound = f"{'≥' if gate.at_least else '≤'} {gate.limit:g}"
        lines.append(f"| {gate.name} | {gate.value:.3f} | {bound} | {'pass' if gate.passed else '**FAIL**'} |")
    return lines


def quality_table(rows: Sequence[EvaluationRow]) -> list[str]:
    """With a column for each measure that was taken."""
    columns = {name: title for name, title in COLUMNS.items() if any(name in row.metrics for row in rows)}
    lines = [
        "## Quality",
        "",
        f"| guidance_scale | model | steps | evaluations | {' | '.join(columns.values())} |",
        f"|---:|---|---:|---:|{'---:|' * len(columns)}",
    ]
    for row in sorted(rows, key=lambda row: row.guidance_scale):
        cells = (figure(row.metrics.get(name)) for name in columns)
        head = f"| {row.guidance_scale:g} | {titled(row)} | {row.steps} | {row.evaluations} |"
        lines.append(f"{head} {' | '.join(cells)} |")
    return lines


def choice_table(choices: Sequence[Choice]) -> list[str]:
    lines = [
        "## Which student for which step count",
        "",
        "The smallest distance to the teacher, mean over guidance, among students that run at every guidance and, "
        f"where agreement was measured, obey the prompt as the teacher does, to {AGREEMENT_SLACK:g}.",
        "",
        "| steps | student | distance to the teacher | worst agreement - teacher's | |",
        "|---:|---|---:|---:|---|",
    ]
    for choice in choices:
        for candidate in choice.candidates:
            verdict = "**best**" if candidate.model == choice.best else candidate.refused
            lead = "–" if candidate.agreement_lead is None else f"{candidate.agreement_lead:+.3f}"
            figures = f"{candidate.paired_distance:.4f} | {lead}"
            lines.append(f"| {choice.steps} | {candidate.model} | {figures} | {verdict} |")
    return lines


def figure(measured: Measured | None) -> str:
    return f"{measured.mean:.3f} ± {measured.spread:.3f}" if measured else "–"
