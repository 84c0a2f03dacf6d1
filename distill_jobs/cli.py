"""``python -m distill_jobs``: run, intervals, evaluate, compare, export, quantize, card, import."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from distill_jobs.errors import JobError, StorageError
from distill_jobs.sections import StoredWeights
from engines.errors import HalfstepError
from engines.manifest import DecoderKind

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
errors = Console(stderr=True)

RunDir = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder made by the run command.")]
Lenders = Annotated[
    list[Path] | None,
    typer.Option("--from", metavar="RUN", help="Take what equal networks drew in this run, e.g. its teacher."),
]
Sizes = Annotated[
    str,
    typer.Option(
        help="Sizes of image, as 512x512,768x512; the first is the default.", show_default="the trained size"
    ),
]


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
    with _one_sentence_errors():
        from distill_jobs import commands  # noqa: PLC0415 - so that --help answers at once

        commands.run(recipe, overrides or [], out, resume=resume, taken_from=taken_from, dry_run=dry_run)


@app.command()
def intervals(
    run_dir: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder whose teacher is finished.")],
    lows: Annotated[
        list[float] | None,
        typer.Option("--log-snr-min", metavar="X", help="Guide from this log-SNR on; may be given several times."),
    ] = None,
    highs: Annotated[
        list[float] | None,
        typer.Option("--log-snr-max", metavar="X", help="Guide up to this log-SNR; may be given several times."),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps that the teacher takes.")] = 16,
    lenders: Lenders = None,
) -> None:
    """Find where to guide: draw with the teacher alone, guided everywhere and between every two of the bounds.

    Writes intervals.md and intervals.json into the run folder. The students of a run whose recipe has these bounds,
    guidance.log_snr_min and guidance.log_snr_max, learn guidance there alone.
    """
    with _one_sentence_errors():
        from distill_jobs import commands  # noqa: PLC0415 - so that --help answers at once

        commands.intervals(run_dir, lows or [], highs or [], steps, lenders or [])


@app.command()
def evaluate(
    run_dir: RunDir,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="Use torch.compile.", show_default="where a C++ compiler is found"
        ),
    ] = None,
    lenders: Lenders = None,
) -> None:
    """Measure a trained run: distances, class agreement and diversity, teacher's rows included.

    Writes report.json, report.md, and the curves/*.png and sheets/*.png that its data have, into the run folder.
    Interrupted, it goes on where it stopped.
    """
    with _one_sentence_errors():
        from distill_jobs import commands  # noqa: PLC0415 - so that --help answers at once

        commands.evaluate(run_dir, compiled, lenders or [])


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="Evaluated run folders, as DIR or NAME=DIR.")],
    out: Annotated[Path, typer.Option(help="Folder for the table and the curves.")],
) -> None:
    """Put evaluated runs of one teacher into one table: comparison.md, comparison.json and curves/*.png.

    Runs that differ in teacher, data, sample count or seeds are refused, and the difference is named.
    """
    with _one_sentence_errors():
        from distill_jobs import commands  # noqa: PLC0415 - so that --help answers at once

        commands.compare(runs, out)


@app.command()
def export(
    run_dir: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A run folder, evaluated; or a published student's pipeline folder, as for import."
        ),
    ],
    bundle: Annotated[Path, typer.Argument(help="Folder to write the bundle to; an older one is replaced.")],
    despite_gates: Annotated[
        bool, typer.Option("--despite-gates", help="Export students that miss the report's targets, too.")
    ] = False,
    decoder: Annotated[
        DecoderKind, typer.Option(help="What decodes latents: the teacher's own autoencoder, or the tiny decoder.")
    ] = "own",
    sizes: Sizes = "",
) -> None:
    """Turn an evaluated run into a bundle: ONNX graphs checked against torch, and a manifest.

    A published student is imported with what is usual, under the bundle's name; import has options for the rest.
    """
    with _one_sentence_errors():
        from distill_jobs import commands  # noqa: PLC0415 - so that --help answers at once

        commands.export(run_dir, bundle, despite_gates=despite_gates, decoder=decoder, sizes=_listed(sizes))


@app.command()
def quantize(
    run_dir: RunDir,
    bundle: Annotated[Path, typer.Argument(help="The bundle that was exported from the run.")],
    destination: Annotated[
        Path, typer.Argument(help="Folder to write the int8 bundle to; an older one is replaced.")
    ],
    batches: Annotated[int, typer.Option(min=2, help="Batches of 8 images each student draws to calibrate.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of their noise and guidance.")] = 0,
    despite_gates: Annotated[
        bool, typer.Option("--despite-gates", help="Write students that lose more quality than they may, too.")
    ] = False,
) -> None:
    """Write a bundle in int8 if its quality holds: the run's evaluation again, drawn by the int8 graphs.

    Exit code 5 where a row loses more than 5 % of its distance or 0.01 of its class agreement.
    """
    with _one_sentence_errors():
        from distill_jobs import commands  # noqa: PLC0415 - so that --help answers at once

        commands.quantize(run_dir, bundle, destination, batches=batches, seed=seed, despite_gates=despite_gates)


@app.command()
def card(
    run_dir: RunDir,
    page: Annotated[Path | None, typer.Argument(help="The page.", show_default="docs/model-card-NAME.md")] = None,
) -> None:
    """Fill in a model card from an evaluated run, or begin one: facts, tables of quality, targets, a sheet.

    What people wrote on the page stays; what stands between its marks is written anew.
    """
    with _one_sentence_errors():
        from distill_jobs import commands  # noqa: PLC0415 - so that --help answers at once

        commands.card(run_dir, page)


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="A pipeline folder: latent consistency, Turbo or Lightning.")],
    bundle: Annotated[Path, typer.Argument(help="Folder to write the bundle to; an older one is replaced.")],
    name: Annotated[str, typer.Option(help="The model id.")],
    steps: Annotated[
        list[int] | None,
        typer.Option(
            help="A step count that it was trained for; the first is the default. "
            "Needed, but for latent consistency.",
            show_default="4, and 1 to 8",
        ),
    ] = None,
    guidance_min: Annotated[
        float | None,
        typer.Option(help="Smallest guidance_scale, where it is an input.", show_default="1, or as trained here"),
    ] = None,
    guidance_max: Annotated[
        float | None, typer.Option(help="Largest guidance_scale.", show_default="15, or as trained here")
    ] = None,
    guidance_default: Annotated[
        float | None, typer.Option(help="What a request without one gets.", show_default="8.5, or as trained here")
    ] = None,
    licence: Annotated[str, typer.Option(help="Of the model's weights, for the bundle.")] = "not stated",
    sizes: Sizes = "",
    weights: Annotated[
        StoredWeights, typer.Option(help="What the bundle's files keep them in; float16 is half the size.")
    ] = "float32",
) -> None:
    """Turn a published few-step student into a bundle, without training."""
    with _one_sentence_errors():
        from distill_jobs import commands  # noqa: PLC0415 - so that --help answers at once

        scales = (guidance_min, guidance_max, guidance_default)
        commands.import_(
            folder,
            bundle,
            name=name,
            steps=steps,
            scales=scales,
            licence=licence,
            sizes=_listed(sizes),
            weights=weights,
        )


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")] if text else []


@contextmanager
def _one_sentence_errors() -> Iterator[None]:
    try:
        yield
    except HalfstepError as error:
        errors.print(f"Error: {error}", style="red", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(error.exit_code if isinstance(error, JobError) else 1) from None
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for --help
            raise
        told = str(error).splitlines()[0]
        hint = (
            "others may use the device, or it is too small. What was finished is kept: `run … --resume` goes on, "
            "and `evaluate` after `run … --resume --set evaluation.batch_size=N`, with a smaller N"
        )
        errors.print(f"Error: too little memory ({told}); {hint}", style="red", soft_wrap=True, markup=False)
        raise typer.Exit(JobError.exit_code) from None
    except OSError as error:  # a full disk, a folder that is a file, a missing permission
        told = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error)
        errors.print(f"Error: {told}", style="red", soft_wrap=True, markup=False, highlight=False)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise typer.Exit(StorageError.exit_code if full else JobError.exit_code) from None
