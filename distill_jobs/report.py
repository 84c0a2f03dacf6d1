"""The report of an evaluation: report.json for programs, report.md for people, and the gates."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

from distill_jobs.task_tables import task_lines
from engines.manifest import Evaluation, EvaluationRow, Measured

JSON_NAME, MARKDOWN_NAME = "report.json", "report.md"
COLUMNS = {
    "frechet_distance": "Fréchet distance",
    "class_agreement": "class agreement",
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "paired_distance": "distance to the teacher",
}
_Rows = dict[tuple[str, int, float], EvaluationRow]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Timing(_Frozen):
    """Seconds that one cell (model, guidance, seed) took, sampling and measuring."""

    cell: str
    seconds: float


class Gate(_Frozen):
    """A target: ``value`` must be at most ``limit``, or at least where ``at_least``."""

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


class Machine(_Frozen):
    system: str
    processor: str
    cores: int
    memory_gib: float


class Report(_Frozen):
    """Everything an evaluation found, and how it was made.

    seconds: of this call, with results kept from earlier ones costing nothing; timings: of each cell when it
    was measured. training_seconds: by phase, wall clock. classifier_accuracy: on held-out real digits.
    weights: sha256 of every network's weights. tasks: a table for each task besides drawing from text.
    """

    recipe: str
    recipe_sha256: str
    command: str
    machine: Machine
    versions: dict[str, str]
    weights: dict[str, str]
    classifier_accuracy: float
    seconds: float
    timings: tuple[Timing, ...]
    training_seconds: dict[str, float]
    evaluation: Evaluation
    tasks: dict[str, tuple[EvaluationRow, ...]] = {}
    gates: tuple[Gate, ...]

    @classmethod
    def read(cls, run_dir: Path) -> Report:
        return cls.model_validate_json((run_dir / JSON_NAME).read_bytes())


def gates(rows: Sequence[EvaluationRow], reference_steps: int) -> tuple[Gate, ...]:
    """The targets that these rows can answer; those about a missing model or guidance are left out."""
    by_key = {(row.model, row.steps, row.guidance_scale): row for row in rows}
    return (
        *_distance_gates(by_key, reference_steps),
        *_agreement_gates(by_key, reference_steps),
        *_teacher_gates(by_key, reference_steps),
    )


def machine() -> Machine:
    """This machine, without its name."""
    return Machine(
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        processor=_processor(),
        cores=psutil.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
    )


def versions() -> dict[str, str]:
    """Versions of the libraries that results depend on."""
    return {name: version(name) for name in ("torch", "diffusers", "numpy", "scikit-learn")}


def write_report(run_dir: Path, report: Report) -> None:
    """Write report.json and report.md."""
    (run_dir / JSON_NAME).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (run_dir / MARKDOWN_NAME).write_text(markdown(report), encoding="utf-8")


def markdown(report: Report) -> str:
    """The report for people: what was measured, the gates, the table."""
    evaluation = report.evaluation
    seeds = ", ".join(str(seed) for seed in evaluation.seeds)
    lines = [
        f"# Evaluation of {report.recipe}",
        "",
        f"{evaluation.samples} samples a row and seed (seeds {seeds}), classes balanced; initial noise and classes "
        "are the same for all models of a seed. Figures are means over seeds ± spread (largest - smallest).",
        "",
        f"- Fréchet distance: {evaluation.metric}, to all real digits; lower is better. Not FID.",
        f"- Class agreement: share of images that the classifier (held-out accuracy "
        f"{report.classifier_accuracy:.4f}) takes for the prompted class.",
        "- Precision: share of samples inside the real images' manifold; recall: share of real images inside the "
        "samples' (3 nearest neighbours); coverage: share of real images with a sample nearer than their 5th "
        "neighbour. Higher is better; recall and coverage fall when variety is lost.",
        "- Distance to the teacher: RMS pixel difference, in the range -1 … 1, from the teacher's finest images at "
        "equal noise.",
        "- Evaluations: network evaluations an image; a guided teacher step counts two.",
        "",
        f"Machine: {report.machine.processor}, {report.machine.cores} cores, {report.machine.memory_gib:g} GiB; "
        f"{report.machine.system}. {', '.join(f'{n} {v}' for n, v in report.versions.items())}. "
        f"Trained in {sum(report.training_seconds.values()):.0f} s, "
        f"measured in {sum(timing.seconds for timing in report.timings):.0f} s.",
    ]
    if report.command:
        lines += ["", f"Command: `{report.command}`"]
    return "\n".join(
        [
            *lines,
            "",
            *_gate_table(report.gates),
            "",
            *_quality_table(evaluation.rows),
            "",
            *task_lines(report.tasks),
        ]
    )


def _distance_gates(rows: _Rows, reference_steps: int) -> Iterator[Gate]:
    """Student over teacher distance at the same guidance."""
    limits = {(4, 1.0): 1.5, (4, 2.0): 1.10, (4, 4.0): 1.10, (1, 1.0): 2.0, (1, 2.0): 2.0, (1, 4.0): 2.0}
    for (steps, scale), limit in limits.items():
        student, teacher = rows.get(("student", steps, scale)), rows.get(("teacher", reference_steps, scale))
        if student is None or teacher is None:
            continue
        ratio = _distance(student) / max(_distance(teacher), 1e-12)
        yield Gate(name=f"{steps}-step distance / teacher's, guidance {scale:g}", value=ratio, limit=limit)


def _agreement_gates(rows: _Rows, reference_steps: int) -> Iterator[Gate]:
    """Smallest lead of a student's class agreement over the teacher's, over all guidance scales."""
    for steps in sorted({steps for model, steps, _ in rows if model == "student"}, reverse=True):
        leads = [
            _agreement(row) - _agreement(rows["teacher", reference_steps, scale])
            for (model, n, scale), row in rows.items()
            if (model, n) == ("student", steps)
        ]
        name = f"{steps}-step class agreement - teacher's, worst guidance"
        yield Gate(name=name, value=min(leads), limit=-0.01, at_least=True)


def _teacher_gates(rows: _Rows, reference_steps: int) -> Iterator[Gate]:
    """A teacher worth distilling: far better at its finest grid than in one step, and obedient."""
    fine, one = rows.get(("teacher", reference_steps, 1.0)), rows.get(("teacher", 1, 1.0))
    if fine is None:
        return
    if one is not None:
        ratio = _distance(fine) / max(_distance(one), 1e-12)
        yield Gate(
            name=f"teacher {reference_steps}-step distance / its 1-step, guidance 1", value=ratio, limit=0.05
        )
    name = f"teacher {reference_steps}-step class agreement, guidance 1"
    yield Gate(name=name, value=_agreement(fine), limit=0.95, at_least=True)


def _distance(row: EvaluationRow) -> float:
    return row.metrics["frechet_distance"].mean


def _agreement(row: EvaluationRow) -> float:
    return row.metrics["class_agreement"].mean


def _gate_table(found: Sequence[Gate]) -> list[str]:
    lines = ["## Gates", "", "| target | value | limit | |", "|---|---:|---:|---|"]
    for gate in found:
        bound = f"{'≥' if gate.at_least else '≤'} {gate.limit:g}"
        lines.append(f"| {gate.name} | {gate.value:.3f} | {bound} | {'pass' if gate.passed else '**FAIL**'} |")
    return lines


def _quality_table(rows: Sequence[EvaluationRow]) -> list[str]:
    lines = [
        "## Quality",
        "",
        f"| guidance_scale | model | steps | evaluations | {' | '.join(COLUMNS.values())} |",
        f"|---:|---|---:|---:|{'---:|' * len(COLUMNS)}",
    ]
    for row in sorted(rows, key=lambda row: row.guidance_scale):
        cells = (_figure(row.metrics.get(name)) for name in COLUMNS)
        model = row.model if row.sampler in ("deterministic", row.model) else f"{row.model}, {row.sampler}"
        head = f"| {row.guidance_scale:g} | {model} | {row.steps} | {row.evaluations} |"
        lines.append(f"{head} {' | '.join(cells)} |")
    return lines


def _figure(measured: Measured | None) -> str:
    return f"{measured.mean:.3f} ± {measured.spread:.3f}" if measured else "–"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
