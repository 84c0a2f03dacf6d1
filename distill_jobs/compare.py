"""Several evaluated runs of one teacher in one table: what an option of the recipe gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from distill_jobs.checkpoint import write_text
from distill_jobs.choices import Choice, choices
from distill_jobs.classifier import CLASSIFIER
from distill_jobs.contenders import STAGE_ONE, STUDENT, TEACHER
from distill_jobs.curves import picture_links, write_comparison_curves
from distill_jobs.errors import JobError
from distill_jobs.glyph_encoder import WEIGHTS
from distill_jobs.latent_sections import LatentTeacher
from distill_jobs.pipelines.glyphs import DATA, GLYPHS, TOP_1
from distill_jobs.pipelines.report import LatentReport
from distill_jobs.recipe import Recipe
from distill_jobs.report import JSON_NAME, Report, RunReport
from distill_jobs.run_folder import RunFolder, stored_recipe
from distill_jobs.solvers import TITLES
from distill_jobs.tables import choice_table, quality_table
from distill_jobs.task_tables import task_lines
from engines.manifest import EvaluationRow

COMPARISON_JSON, COMPARISON_MARKDOWN = "comparison.json", "comparison.md"
_OF_TEACHER = {DATA, TEACHER, *(f"{TEACHER}, {title}" for title in TITLES.values())}


@dataclass(frozen=True)
class EvaluatedRun:
    """A run to compare. name: how its rows are called."""

    name: str
    path: Path
    recipe: Recipe
    report: RunReport

    @classmethod
    def read(cls, argument: str) -> EvaluatedRun:
        """From ``DIR`` or ``NAME=DIR``; the name is the folder's where none is given.

        Raises: JobError when the folder holds no run, or it is not evaluated as its recipe says.
        """
        name, named, folder = argument.rpartition("=")
        path = Path(folder)
        recipe = stored_recipe(RunFolder(path))
        if not (path / JSON_NAME).is_file():
            raise JobError(f"{path} is not evaluated yet; run: python -m distill_jobs evaluate {path}")
        kind: type[RunReport] = LatentReport if isinstance(recipe.teacher, LatentTeacher) else Report
        report = kind.read(path)
        if f"{TEACHER}-{recipe.evaluation.teacher_steps}" not in report.weights:
            again = f"python -m distill_jobs evaluate {path}"
            raise JobError(f"{path} was evaluated before its evaluation.teacher_steps changed; run again: {again}")
        return cls(name if named else path.resolve().name, path, recipe, report)

    def conditions(self) -> dict[str, object]:
        """What must be equal for the rows of two runs to stand in one table."""
        settings, evaluation = self.recipe.evaluation, self.report.evaluation
        judge = (
            self.path / CLASSIFIER
            if isinstance(self.report, Report)
            else RunFolder(self.path).glyph_encoder / WEIGHTS
        )
        return {
            "data": self._data(),
            "teacher's weights": self.report.weights[f"{TEACHER}-{settings.teacher_steps}"],
            "evaluation.teacher_steps": settings.teacher_steps,
            "schedule": self.recipe.schedule,
            "where the teacher is guided": self.recipe.guidance.interval or "everywhere",
            "clip": self.recipe.clip,
            "evaluation.samples": evaluation.samples,
            "evaluation.seeds": evaluation.seeds,
            "measure": evaluation.metric,
            "evaluation.features_path": self.report.features,
            self.judge: judge.read_bytes() if judge.is_file() else None,
            "measures": sorted(evaluation.rows[0].metrics),
        }

    @property
    def judge(self) -> str:
        """What says whether images show what was asked for."""
        return "classifier" if isinstance(self.report, Report) else "glyph encoder"

    def _data(self) -> object:
        """What the prompts and images of an evaluation are chosen from, and by which seed."""
        if isinstance(self.report, Report):
            return self.recipe.data
        read = RunFolder(self.path).data
        return read.read_text(encoding="utf-8") if read.is_file() else "", self.recipe.seed


class Comparison(BaseModel):
    """What ``compare`` writes for programs. rows, and those of tasks: the teacher's once, then each run's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: str
    runs: dict[str, str]
    metric: str
    samples: int
    seeds: tuple[int, ...]
    rows: tuple[EvaluationRow, ...]
    choices: tuple[Choice, ...]
    tasks: dict[str, tuple[EvaluationRow, ...]] = {}


def compare_runs(runs: Sequence[EvaluatedRun], out: Path, *, command: str = "") -> Comparison:
    """Write comparison.json, comparison.md and curves/ into ``out``.

    Raises: JobError naming the difference when the runs are not of one teacher, data, counts and seeds.
    """
    _check(runs)
    first, steps = runs[0], runs[0].recipe.evaluation.teacher_steps
    evaluation, rows = first.report.evaluation, _joined({run.name: run.report.evaluation.rows for run in runs})
    tasks = dict.fromkeys(name for run in runs for name in run.report.tasks)
    joined = {task: _joined({run.name: run.report.tasks.get(task, ()) for run in runs}) for task in tasks}
    comparison = Comparison(
        command=command,
        runs={run.name: run.report.recipe_sha256 for run in runs},
        metric=evaluation.metric,
        samples=evaluation.samples,
        seeds=evaluation.seeds,
        rows=rows,
        choices=choices(_with_agreement(rows, joined.get(GLYPHS, ())), steps),
        tasks=joined,
    )
    out.mkdir(parents=True, exist_ok=True)
    write_comparison_curves(out, rows, steps)
    write_text(out / COMPARISON_JSON, comparison.model_dump_json(indent=1) + "\n")
    write_text(out / COMPARISON_MARKDOWN, _markdown(comparison, first.report.legend()))
    return comparison


def _check(runs: Sequence[EvaluatedRun]) -> None:
    names = [run.name for run in runs]
    if len(runs) < 2 or len(set(names)) < len(names):
        raise JobError("compare takes two or more runs with different names; name one with NAME=DIR")
    if taken := [name for name in names if "," in name or name in (TEACHER, STAGE_ONE)]:
        raise JobError(f"{taken[0]!r} cannot be the name of a run; give another with NAME=DIR")
    for other in runs[1:]:
        there = other.conditions()
        for what, here in runs[0].conditions().items():
            if there[what] != here:
                raise JobError(
                    f"{names[0]} and {other.name} cannot be compared: {_difference(what, here, there[what])}"
                )


def _difference(what: str, here: object, there: object) -> str:
    if what in ("classifier", "glyph encoder"):
        return (
            f"they differ in the {what}; make them share one with python -m distill_jobs evaluate RUN --from OTHER"
        )
    told = what not in ("data", "teacher's weights")
    return f"{what} differ: {here} and {there}" if told else f"they differ in the {what}"


def _joined(tables: Mapping[str, Sequence[EvaluationRow]]) -> tuple[EvaluationRow, ...]:
    """The table of several runs: every row of teacher and data that any has, once, then the runs' own by name.

    Plain students bear their run's name alone, others keep theirs behind it.
    """
    of_teacher: dict[tuple[str, int, float], EvaluationRow] = {}
    own = []
    for name, rows in tables.items():
        for row in rows:
            if row.model in _OF_TEACHER:
                of_teacher.setdefault((row.model, row.steps, row.guidance_scale), row)
            elif row.model != STAGE_ONE:
                model = name if row.model == STUDENT else f"{name}, {row.model}"
                own.append(row.model_copy(update={"model": model}))
    return (*of_teacher.values(), *own)


def _with_agreement(rows: Sequence[EvaluationRow], glyphs: Sequence[EvaluationRow]) -> list[EvaluationRow]:
    """The rows with the agreement that the table of glyphs found for the same students, where it has them."""
    found = {(row.model, row.steps, row.sampler, row.guidance_scale): row.metrics[TOP_1] for row in glyphs}
    keys = [(row.model, row.steps, row.sampler, row.guidance_scale) for row in rows]
    return [
        row.model_copy(update={"metrics": {**row.metrics, TOP_1: found[key]}}) if key in found else row
        for row, key in zip(rows, keys, strict=True)
    ]


def _markdown(comparison: Comparison, legend: Sequence[str]) -> str:
    seeds = ", ".join(str(seed) for seed in comparison.seeds)
    head = [
        f"# {', '.join(comparison.runs)}",
        "",
        f"{comparison.samples} samples a row and seed (seeds {seeds}); teacher, initial noise and prompts "
        "are the same in all runs. Figures are means over seeds ± spread (largest - smallest).",
        "",
        *legend,
    ]
    if comparison.command:
        head += ["", f"Command: `{comparison.command}`"]
    tables = (choice_table(comparison.choices), quality_table(comparison.rows), task_lines(comparison.tasks))
    pictures = picture_links(comparison.rows)
    return "\n".join([*head, *(line for table in tables for line in ("", *table)), "", *pictures, ""])
