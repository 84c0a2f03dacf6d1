"""``python -m distill_jobs``: run, evaluate, export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from distill_jobs.errors import JobError
from distill_jobs.job import run_job
from distill_jobs.recipe import read_recipe
from engines.errors import HalfstepError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
errors = Console(stderr=True)

RunDir = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder made by the run command.")]


@app.callback()
def main() -> None:
    """Distil a classifier-free-guided diffusion model to a few steps, guidance kept as an input."""


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one: digits.")],
    out: Annotated[Path | None, typer.Option(help="Run folder.  [default: runs/NAME]")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a field, e.g. teacher.updates=100."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
) -> None:
    """Train teacher, stage one and every halving, resumably, into a run folder.

    Exit codes: 1 error, 2 wrong or changed recipe, 3 folder in use, 4 stopped by a signal after a checkpoint,
    5 training diverged or missed a gate.
    """
    with _one_sentence_errors(), _progress() as progress:
        read = read_recipe(recipe, overrides)
        folder = run_job(read, out or Path("runs") / read.name, resume=resume, progress=progress)
        progress.console.print(f"Trained. Next: python -m distill_jobs evaluate {folder.path}")


@contextmanager
def _one_sentence_errors() -> Iterator[None]:
    try:
        yield
    except HalfstepError as error:
        errors.print(f"Error: {error}", style="red", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(error.exit_code if isinstance(error, JobError) else 1) from None


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
        console=Console(stderr=True),
    )
