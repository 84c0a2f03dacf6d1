"""Where to guide a teacher: it alone, guided between several pairs of noise levels, before any student is trained.

Source: Kynkäänniemi et al. 2024, who choose the interval by the Fréchet distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich.progress import Progress

from distill_jobs.checkpoint import write_text
from distill_jobs.contenders import TEACHER, Contender, guided_where_applied, latent_shape
from distill_jobs.errors import RecipeError
from distill_jobs.evaluate import measure_teachers
from distill_jobs.latent_sections import LatentTeacher
from distill_jobs.pipelines.evaluate import measure_latent_teachers
from distill_jobs.pipelines.glyphs import GLYPHS, TOP_1
from distill_jobs.recipe_file import read_recipe
from distill_jobs.report import Machine, machine, versions
from distill_jobs.run_folder import RunFolder, stored_recipe
from distill_jobs.tables import quality_table
from distill_jobs.task_tables import task_lines
from engines.manifest import EvaluationRow

JSON_NAME, MARKDOWN_NAME = "intervals.json", "intervals.md"
BOUNDS = ("guidance.log_snr_min", "guidance.log_snr_max")
UNBOUNDED = "guided everywhere"


class IntervalReport(BaseModel):
    """What teachers guided in several intervals draw. rows: by guidance, the one guided everywhere first."""

    model_config = ConfigDict(frozen=True)

    recipe: str
    command: str
    machine: Machine
    versions: dict[str, str]
    teacher_sha256: str
    metric: str
    samples: int
    seeds: tuple[int, ...]
    rows: tuple[EvaluationRow, ...]

    def markdown(self) -> str:
        glyphs = any(TOP_1 in row.metrics for row in self.rows)
        table = task_lines({GLYPHS: self.rows}) if glyphs else quality_table(self.rows)
        lines = [
            f"# Where to guide the teacher of {self.recipe}",
            "",
            f"The same noise for all rows, {self.samples} pictures a row and seed (seeds "
            f"{', '.join(map(str, self.seeds))}). Fréchet distance: {self.metric}; lower is better. Distances to "
            f"the teacher are to the one that is {UNBOUNDED}. Machine: {self.machine.processor}, "
            f"{self.machine.cores} cores. Teacher: sha256 `{self.teacher_sha256}`.",
            "",
            f"Command: `{self.command}`",
            "",
            *table,
        ]
        return "\n".join(lines).rstrip() + "\n"


def measure_intervals(
    run_dir: Path,
    teachers: Sequence[Contender],
    *,
    progress: Progress,
    command: str = "",
    lenders: Sequence[Path] = (),
) -> IntervalReport:
    """Measure ``interval_teachers`` of a run; write intervals.json and intervals.md.

    What is drawn is kept: a second call draws what it has not drawn yet. lenders: other run folders, whose latents,
    classifier and image encoder are taken where they are equal. Raises: RecipeError when nobody judges; JobError.
    """
    recipe = stored_recipe(RunFolder(run_dir))
    measure = measure_latent_teachers if isinstance(recipe.teacher, LatentTeacher) else measure_teachers
    found = measure(run_dir, recipe, teachers, progress, lenders)
    report = IntervalReport(
        recipe=recipe.name,
        command=command,
        machine=machine(),
        versions=versions(),
        teacher_sha256=teachers[0].weights_sha256(),
        metric=found.metric,
        samples=found.samples,
        seeds=found.seeds,
        rows=tuple(sorted(found.rows, key=lambda row: row.guidance_scale)),
    )
    write_text(run_dir / MARKDOWN_NAME, report.markdown())
    write_text(run_dir / JSON_NAME, report.model_dump_json(indent=1) + "\n")
    return report


def interval_teachers(
    folder: RunFolder, lows: Sequence[float], highs: Sequence[float], steps: int
) -> tuple[Contender, ...]:
    """A run's finished teacher, guided everywhere first, then from every low to every high log-SNR.

    lows, highs: one of them empty for no bound. steps: the teacher's. Raises: RecipeError when nothing would be
    guided, or nothing bounded; JobError when no teacher stands.
    """
    if not lows and not highs:
        raise RecipeError("give a bound to try, with --log-snr-min or --log-snr-max")
    if crossed := [f"{low:g} and {high:g}" for low, high in product(lows, highs) if low >= high]:
        raise RecipeError(
            f"--log-snr-min must be below --log-snr-max in every pair of them, and is not in {', '.join(crossed)}; "
            "measure those bounds in calls of their own"
        )
    if steps > (timesteps := stored_recipe(folder).schedule.timesteps):
        raise RecipeError(f"--steps {steps}: the schedule has {timesteps} timesteps (schedule.timesteps)")
    pairs = [(None, None), *product(dict.fromkeys(lows) or [None], dict.fromkeys(highs) or [None])]
    teachers = tuple(_teacher(folder, pair, steps) for pair in pairs)
    teachers[0].weights_sha256()
    return teachers


def _teacher(folder: RunFolder, bounds: tuple[float | None, float | None], steps: int) -> Contender:
    told = [f"{name}={'null' if bound is None else bound}" for name, bound in zip(BOUNDS, bounds, strict=True)]
    stored = stored_recipe(folder)
    chains = {"stage_two": stored.stage_two, "encoder": stored.encoder}
    told += [f"{at}.guided_share=null" for at, chain in chains.items() if chain and chain.guided_share is not None]
    recipe = read_recipe(folder.recipe, told)
    scales = tuple(scale for scale in recipe.evaluation.guidance_scales if scale > 1)
    if not scales:
        raise RecipeError("evaluation.guidance_scales: none is above 1, so there is no guidance to bound")
    where = recipe.guidance.interval
    name = f"guided {where}" if where else UNBOUNDED
    whole = Contender(TEACHER, steps, folder.teacher, latent_shape(recipe), name=name, scales=scales)
    teacher = guided_where_applied(whole, recipe)
    if len(teacher.unguided) == steps:
        raise RecipeError(f"of {steps} steps none is {name}; take more --steps, or other bounds")
    return teacher
