"""The report of an evaluation: report.json for programs, report.md for people."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

from distill_jobs.choices import Choice
from distill_jobs.curves import picture_links
from distill_jobs.gates import Gate
from distill_jobs.tables import choice_table, gate_table, legend, quality_table
from distill_jobs.task_tables import task_lines
from engines.manifest import Evaluation, EvaluationRow

JSON_NAME, MARKDOWN_NAME = "report.json", "report.md"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Timing(_Frozen):
    """Seconds that one cell (model, guidance, seed) took, sampling and measuring."""

    cell: str
    seconds: float


class Machine(_Frozen):
    system: str
    processor: str
    cores: int
    memory_gib: float


class Report(_Frozen):
    """Everything an evaluation found, and how it was made.

    seconds: of this call, with results kept from earlier ones costing nothing; timings: of each cell when it
    was measured. training_seconds: by phase, wall clock. classifier_accuracy: on held-out real digits.
    weights: sha256 of every network's weights. tasks: a table for each task besides drawing from text. choices:
    which student is best for each step count.
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
    choices: tuple[Choice, ...] = ()

    @classmethod
    def read(cls, run_dir: Path) -> Report:
        return cls.model_validate_json((run_dir / JSON_NAME).read_bytes())


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
        *legend(evaluation.metric, report.classifier_accuracy),
        "",
        f"Machine: {report.machine.processor}, {report.machine.cores} cores, {report.machine.memory_gib:g} GiB; "
        f"{report.machine.system}. {', '.join(f'{n} {v}' for n, v in report.versions.items())}. "
        f"Trained in {sum(report.training_seconds.values()):.0f} s, "
        f"measured in {sum(timing.seconds for timing in report.timings):.0f} s.",
    ]
    if report.command:
        lines += ["", f"Command: `{report.command}`"]
    tables = (
        gate_table(report.gates),
        choice_table(report.choices),
        quality_table(evaluation.rows),
        task_lines(report.tasks),
    )
    return "\n".join([*lines, *(line for table in tables for line in ("", *table)), "", *picture_links(), ""])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
