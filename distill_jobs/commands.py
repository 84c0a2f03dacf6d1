"""What the commands do once their arguments are read. Apart from ``cli``, so that --help needs no torch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from rich.progress import Progress
from transformers.utils import logging as transformers_logging

from distill_jobs.card import write_card
from distill_jobs.compare import COMPARISON_MARKDOWN, EvaluatedRun, compare_runs
from distill_jobs.errors import RecipeError
from distill_jobs.evaluate import evaluate_run
from distill_jobs.export import evaluation_of, export_run
from distill_jobs.int8 import quantize_run
from distill_jobs.intervals import MARKDOWN_NAME as INTERVALS_MARKDOWN
from distill_jobs.intervals import interval_teachers, measure_intervals
from distill_jobs.job import run_job
from distill_jobs.latent_sections import FolderTeacher, LatentTeacher
from distill_jobs.pipelines.evaluate import evaluate_latent_run
from distill_jobs.pipelines.importing import import_student
from distill_jobs.pipelines.teacher import open_teacher
from distill_jobs.plan import measure, plan_of
from distill_jobs.plan_page import print_plan
from distill_jobs.processes import launched_rank
from distill_jobs.progress import job_progress
from distill_jobs.recipe import Recipe
from distill_jobs.recipe_file import read_recipe
from distill_jobs.report import RunReport
from distill_jobs.run_folder import RunFolder, stored_recipe
from distill_jobs.sections import StoredWeights
from distill_jobs.tables import gate_table
from distill_jobs.taken import takeable
from engines.bundle import Bundle, verify_bundle
from engines.manifest import DecoderKind
from engines.quantize import Int8Options


def run(
    name: str,
    overrides: Sequence[str],
    out: Path | None,
    *,
    resume: bool,
    taken_from: Path | None,
    dry_run: bool,
) -> None:
    """Train a recipe, or print its plan. Raises: JobError."""
    with _display() as progress:
        recipe = read_recipe(name, list(overrides))
        chosen = out or Path("runs") / recipe.name
        if dry_run:
            _print_plan(recipe, chosen, taken_from)
            return
        folder = run_job(recipe, chosen, resume=resume, progress=progress, taken_from=taken_from)
        progress.console.print(f"Trained. Next: python -m distill_jobs evaluate {folder.path}")


def evaluate(run_dir: Path, compiled: bool | None, lenders: Sequence[Path]) -> None:
    """Measure a trained run. compiled: None where a C++ compiler decides. Raises: JobError."""
    with _display() as progress:
        recipe = stored_recipe(RunFolder(run_dir))
        for lender in lenders:
            stored_recipe(RunFolder(lender))  # says so where it is no run folder
        told = "".join(f" --from {lender}" for lender in lenders)
        command = f"python -m distill_jobs evaluate {run_dir}{told}"
        latent = isinstance(recipe.teacher, LatentTeacher)
        if latent and compiled:
            raise RecipeError("--compile is for digits; networks of a latent run are evaluated as they are")
        use = shutil.which("c++") is not None if compiled is None else compiled
        report: RunReport
        with RunFolder(run_dir).locked():
            if latent:
                report = evaluate_latent_run(run_dir, recipe, progress=progress, command=command, lenders=lenders)
            else:
                report = evaluate_run(
                    run_dir, recipe, progress=progress, command=command, compiled=use, lenders=lenders
                )
        progress.console.print(f"Measured in {report.seconds:.0f} s: {run_dir / 'report.md'}")


def intervals(
    run_dir: Path, lows: Sequence[float], highs: Sequence[float], steps: int, lenders: Sequence[Path]
) -> None:
    """Measure a run's teacher, guided in several intervals. Raises: JobError."""
    bounds = *(f"--log-snr-min {low:g}" for low in lows), *(f"--log-snr-max {high:g}" for high in highs)
    told = " ".join((*bounds, f"--steps {steps}", *(f"--from {lender}" for lender in lenders)))
    command = f"python -m distill_jobs intervals {run_dir} {told}"
    with _display() as progress:
        for each in (run_dir, *lenders):
            stored_recipe(RunFolder(each))  # says so where it is no run folder
        with RunFolder(run_dir).locked():
            teachers = interval_teachers(RunFolder(run_dir), lows, highs, steps)
            measure_intervals(run_dir, teachers, progress=progress, command=command, lenders=lenders)
        progress.console.print(f"Measured: {run_dir / INTERVALS_MARKDOWN}")


def compare(runs: Sequence[str], out: Path) -> None:
    """Put evaluated runs into one table. Raises: JobError."""
    command = f"python -m distill_jobs compare {' '.join(runs)} --out {out}"
    compare_runs([EvaluatedRun.read(run) for run in runs], out, command=command)
    Console(stderr=True).print(f"Wrote {out / COMPARISON_MARKDOWN}")


def export(run_dir: Path, bundle: Path, *, despite_gates: bool, decoder: DecoderKind, sizes: Sequence[str]) -> None:
    """Turn an evaluated run into a bundle, or a published student's pipeline folder. Raises: JobError."""
    if (run_dir / "model_index.json").is_file() and not RunFolder(run_dir).recipe.is_file():
        if despite_gates or decoder != "own":
            raise RecipeError(f"{run_dir} is a pipeline folder, not a run: it has no gates and no tiny decoder")
        import_(run_dir, bundle, name=bundle.name, sizes=sizes)
        return
    with _display() as progress:
        recipe = stored_recipe(RunFolder(run_dir))
        written = export_run(
            run_dir, bundle, recipe, progress=progress, despite_gates=despite_gates, decoder=decoder, sizes=sizes
        )
        _say_written(progress, written)


def quantize(
    run_dir: Path, bundle: Path, destination: Path, *, batches: int, seed: int, despite_gates: bool
) -> None:
    """Write a run's bundle in int8, if its quality holds. Raises: JobError, BundleError, BackendError."""
    with _display() as progress:
        recipe, exported = stored_recipe(RunFolder(run_dir)), verify_bundle(bundle)
        written, gates = quantize_run(
            run_dir,
            recipe,
            exported,
            destination,
            Int8Options(batches, seed),
            progress=progress,
            despite_gates=despite_gates,
        )
        progress.console.print("\n".join(gate_table(gates)), markup=False)
        _say_written(progress, written)


def card(run_dir: Path, page: Path | None) -> None:
    """Fill in the model card of an evaluated run. Raises: JobError."""
    recipe = stored_recipe(RunFolder(run_dir))
    there = page or Path("docs") / f"model-card-{recipe.export.name}.md"
    write_card(RunFolder(run_dir), recipe, evaluation_of(run_dir, recipe), there)
    Console(stderr=True).print(f"Wrote {there}")


def import_(
    folder: Path,
    bundle: Path,
    *,
    name: str,
    steps: Sequence[int] | None = None,
    scales: tuple[float | None, float | None, float | None] = (None, None, None),
    licence: str = "not stated",
    sizes: Sequence[str] = (),
    weights: StoredWeights = "float32",
) -> None:
    """Turn a published student into a bundle. scales: least, largest and default, or None. Raises: JobError."""
    with _display() as progress:
        written = import_student(
            folder,
            bundle,
            name=name,
            steps=steps,
            scales=scales,
            licence=licence,
            progress=progress,
            sizes=sizes,
            weights=weights,
        )
        _say_written(progress, written)


def _print_plan(recipe: Recipe, out: Path, taken_from: Path | None) -> None:
    if isinstance(recipe.teacher, FolderTeacher) and recipe.teacher.folder.exists():
        open_teacher(recipe)  # refuses what the run would; a folder that is still to come is named below the plan
    plan = plan_of(recipe)
    if taken_from is not None:
        plan = replace(plan, taken=takeable(recipe, RunFolder(taken_from)).names)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    measured = measure(recipe) if plan.measurable(device) else None
    print_plan(plan, measured, out, Console())


def _say_written(progress: Progress, bundle: Bundle) -> None:
    progress.console.print(f"Wrote {bundle.path}. Serve it: python -m server serve --bundle {bundle.path}")


def _display() -> Progress:
    """Of the processes that work on one job only the first shows anything.

    The libraries' own bars, of weights that load in moments, would break into it.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return job_progress(quiet=launched_rank() > 0)
