"""The report of an evaluation: report.json for programs, report.md for people."""

from __future__ import annotations

import platform
from abc import abstractmethod
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from distill_jobs.checkpoint import write_text
from distill_jobs.choices import Choice
from distill_jobs.curves import picture_links
from distill_jobs.errors import JobError
from distill_jobs.gates import Gate
from distill_jobs.recipe import Recipe
from distill_jobs.run_folder import RunFolder, training_seconds
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


class RunReport(_Frozen):
    """What an evaluation found, and how it was made: what the reports of all kinds of runs share.

    seconds: of this call, with results kept from earlier ones costing nothing; training_seconds: by phase, wall
    clock. evaluated_sha256: of the recipe but for how its bundle is called and packed. weights: sha256 of every
    network's weights. features: hash of the user's own weights that pictures are measured with. tasks: a table for
    each task besides drawing from text.
    """

    recipe: str
    recipe_sha256: str
    evaluated_sha256: str = ""
    command: str
    machine: Machine
    versions: dict[str, str]
    weights: dict[str, str]
    features: str = ""
    seconds: float
    training_seconds: dict[str, float]
    evaluation: Evaluation
    tasks: dict[str, tuple[EvaluationRow, ...]] = {}
    gates: tuple[Gate, ...]

    @classmethod
    def made(
        cls, run_dir: Path, recipe: Recipe, *, command: str, weights: dict[str, str], seconds: float, **found: Any
    ) -> Self:
        """A report of this run, made here and now. found: the other fields, what was measured."""
        return cls(
            recipe=recipe.name,
            recipe_sha256=recipe.sha256(),
            evaluated_sha256=recipe.evaluated_sha256(),
            command=command,
            machine=machine(),
            versions=versions(),
            weights=weights,
            seconds=seconds,
            training_seconds=training_seconds(RunFolder(run_dir)),
            **found,
        )

    @classmethod
    def read(cls, run_dir: Path) -> Self:
        """Raises: JobError when another version wrote it, or it is damaged."""
        try:
            return cls.model_validate_json((run_dir / JSON_NAME).read_bytes())
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            raise JobError(
                f"{run_dir / JSON_NAME} cannot be read ({'.'.join(map(str, first['loc']))}: {first['msg']}); run "
                f"again: python -m distill_jobs evaluate {run_dir}"
            ) from None

    def write(self, run_dir: Path) -> None:
        """Write report.md and report.json, each in one move. Raises: StorageError."""
        write_text(run_dir / MARKDOWN_NAME, self.markdown())
        write_text(run_dir / JSON_NAME, self.model_dump_json(indent=1) + "\n")

    @abstractmethod
    def markdown(self) -> str:
        """The report for people."""

    @abstractmethod
    def quality(self) -> str:
        """The table of quality alone, in Markdown."""

    @abstractmethod
    def legend(self) -> list[str]:
        """What the columns of that table are, in Markdown."""


class Report(RunReport):
    """Of a run on digits.

    timings: of each cell when it was measured. classifier_accuracy: on held-out real digits. choices: which student
    is best for each step count.
    """

    classifier_accuracy: float
    timings: tuple[Timing, ...]
    choices: tuple[Choice, ...] = ()

    def markdown(self) -> str:
        """What was measured, the gates, the tables."""
        evaluation, told = self.evaluation, self.machine
        seeds = ", ".join(str(seed) for seed in evaluation.seeds)
        lines = [
            f"# Evaluation of {self.recipe}",
            "",
            f"{evaluation.samples} samples a row and seed (seeds {seeds}), classes balanced; initial noise and "
            "classes are the same for all models of a seed. Figures are means over seeds ± spread (largest - "
            "smallest).",
            "",
            *self.legend(),
            "",
            f"Machine: {told.processor}, {told.cores} cores, {told.memory_gib:g} GiB; "
            f"{told.system}. {', '.join(f'{n} {v}' for n, v in self.versions.items())}. "
            f"Trained in {sum(self.training_seconds.values()):.0f} s, "
            f"measured in {sum(timing.seconds for timing in self.timings):.0f} s.",
        ]
        if self.command:
            lines += ["", f"Command: `{self.command}`"]
        tables = (
            gate_table(self.gates),
            choice_table(self.choices),
            quality_table(evaluation.rows),
            task_lines(self.tasks),
        )
        return "\n".join(
            [*lines, *(line for table in tables for line in ("", *table)), "", *picture_links(evaluation.rows), ""]
        )

    def legend(self) -> list[str]:
        return legend(self.evaluation.metric, self.classifier_accuracy)

    def quality(self) -> str:
        return "\n".join(quality_table(self.evaluation.rows)[2:])


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


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
