"""``python -m distill_jobs``: run, evaluate, compare, export."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from distill_jobs.compare import COMPARISON_MARKDOWN, EvaluatedRun, compare_runs
from distill_jobs.errors import JobError, RecipeError
from distill_jobs.evaluate import evaluate_run
from distill_jobs.export import export_run
from distill_jobs.job import run_job
from distill_jobs.latent_sections import FolderTeacher
from distill_jobs.pipelines.evaluate import evaluate_latent_run
from distill_jobs.pipelines.importing import import_student
from distill_jobs.plan import measure, plan_of
from distill_jobs.plan_page import print_plan
from distill_jobs.progress import job_progress
from distill_jobs.recipe_file import read_recipe
from distill_jobs.run_folder import RunFolder, stored_recipe
from distill_jobs.taken import takeable
from engines.errors import HalfstepError
from engines.manifest import GuidanceRange

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
errors = Console(stderr=True)

RunDir = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder made by the run command.")]


@app.callback()
def main() -> None:
    """Distil a classifier-free-guided diffusion model to a few steps, guidance kept as an input."""


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one: digits.")],
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/NAME")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a field, e.g. teacher.updates=100."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    taken_from: Annotated[
        Path | None,
        typer.Option("--from", metavar="RUN", help="Copy the finished phases that this run has in common."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its cost (memory, disk, hours); train nothing.")
    ] = False,
) -> None:
    """Train teacher, stage one and every halving, resumably, into a run folder.

    Exit codes: 1 error, 2 wrong or changed recipe, 3 folder in use, 4 stopped by a signal after a checkpoint,
    5 training diverged or missed a gate, 6 the disk refused a write.
    """
    with _one_sentence_errors(), job_progress() as progress:
        read = read_recipe(recipe, overrides)
        chosen = out or Path("runs") / read.name
        if dry_run:
            plan = plan_of(read)
            if taken_from is not None:
                plan = replace(plan, taken=takeable(read, RunFolder(taken_from)).names)
            device = torch.accelerator.current_accelerator() or torch.device("cpu")
            measured = measure(read) if plan.measurable(device) else None
            print_plan(plan, measured, chosen, Console())
            return
        folder = run_job(read, chosen, resume=resume, progress=progress, taken_from=taken_from)
        progress.console.print(f"Trained. Next: python -m distill_jobs evaluate {folder.path}")


@app.command()
def evaluate(
    run_dir: RunDir,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Use torch.compile.  [default: where a C++ compiler is found]"),
    ] = None,
    lenders: Annotated[
        list[Path] | None,
        typer.Option("--from", metavar="RUN", help="Take equal cells of this run, e.g. its teacher's rows."),
    ] = None,
) -> None:
    """Measure a trained run: distances, class agreement and diversity, teacher's rows included.

    Writes report.json, report.md, curves/*.png and sheets/*.png into the run folder. Interrupted, it goes on
    where it stopped.
    """
    with _one_sentence_errors(), job_progress() as progress:
        recipe = stored_recipe(RunFolder(run_dir))
        others = [*(lenders or [])]
        command = " ".join(["python -m distill_jobs evaluate", str(run_dir), *(f"--from {o}" for o in others)])
        for other in others:
            stored_recipe(RunFolder(other))  # says so where it is no run folder
        use = shutil.which("c++") is not None if compiled is None else compiled
        with RunFolder(run_dir).locked():
            if isinstance(recipe.teacher, FolderTeacher):
                if lenders or compiled:
                    raise RecipeError("--from and --compile are for digits; a latent run measures all of its rows")
                seconds = evaluate_latent_run(run_dir, recipe, progress=progress, command=command).seconds
            else:
                seconds = evaluate_run(
                    run_dir, recipe, progress=progress, command=command, compiled=use, lenders=others
                ).seconds
        progress.console.print(f"Measured in {seconds:.0f} s: {run_dir / 'report.md'}")


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="Evaluated run folders, as DIR or NAME=DIR.")],
    out: Annotated[Path, typer.Option(help="Folder for the table and the curves.")],
) -> None:
    """Put evaluated runs of one teacher into one table: comparison.md, comparison.json and curves/*.png.

    Runs that differ in teacher, data, sample count or seeds are refused, and the difference is named.
    """
    with _one_sentence_errors():
        command = f"python -m distill_jobs compare {' '.join(runs)} --out {out}"
        compare_runs([EvaluatedRun.read(run) for run in runs], out, command=command)
        Console(stderr=True).print(f"Wrote {out / COMPARISON_MARKDOWN}")


@app.command()
def export(
    run_dir: RunDir,
    bundle: Annotated[Path, typer.Argument(help="Folder to write the bundle to; an older one is replaced.")],
    despite_gates: Annotated[
        bool, typer.Option("--despite-gates", help="Export students that miss the report's targets, too.")
    ] = False,
) -> None:
    """Turn an evaluated run into a bundle: ONNX graphs checked against torch, and a manifest."""
    with _one_sentence_errors(), job_progress() as progress:
        recipe = stored_recipe(RunFolder(run_dir))
        written = export_run(run_dir, bundle, recipe, progress=progress, despite_gates=despite_gates)
        progress.console.print(f"Wrote {written.path}. Serve it: python -m server serve --bundle {written.path}")


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="A pipeline folder of the latent consistency kind.")],
    bundle: Annotated[Path, typer.Argument(help="Folder to write the bundle to; an older one is replaced.")],
    name: Annotated[str, typer.Option(help="The model id.")],
    steps: Annotated[
        list[int] | None,
        typer.Option(help="A step count to serve; the first is the default.  [default: 5, 10, 2, 1]"),
    ] = None,
    guidance_min: Annotated[float, typer.Option(help="Smallest guidance_scale.")] = 1.0,
    guidance_max: Annotated[float, typer.Option(help="Largest guidance_scale.")] = 15.0,
    guidance_default: Annotated[float, typer.Option(help="What a request without one gets.")] = 8.5,
    licence: Annotated[str, typer.Option(help="Of the model's weights, for the bundle.")] = "not stated",
) -> None:
    """Turn a published few-step student into a bundle, without training."""
    with _one_sentence_errors(), job_progress() as progress:
        if not 1 <= guidance_min <= guidance_default <= guidance_max:
            raise RecipeError("guidance needs 1 <= --guidance-min <= --guidance-default <= --guidance-max")
        written = import_student(
            folder,
            bundle,
            name=name,
            steps=steps or (5, 10, 2, 1),
            guidance=GuidanceRange(min=guidance_min, max=guidance_max, default=guidance_default),
            licence=licence,
            progress=progress,
        )
        progress.console.print(f"Wrote {written.path}. Serve it: python -m server serve --bundle {written.path}")


@contextmanager
def _one_sentence_errors() -> Iterator[None]:
    try:
        yield
    except HalfstepError as error:
        errors.print(f"Error: {error}", style="red", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(error.exit_code if isinstance(error, JobError) else 1) from None
    except OSError as error:  # a full disk, a folder that is a file, a missing permission
        errors.print(f"Error: {error.strerror}: {error.filename}", style="red", soft_wrap=True, markup=False)
        raise typer.Exit(1) from None
