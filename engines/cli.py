"""``python -m engines``: verify a bundle, lower it to int8, build its engine cache, bench and compare backends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from engines.backends.base import RUNGS
from engines.backends.load import PrecisionName, choose_backend, machine_of
from engines.bench import bench
from engines.bundle import verify_bundle
from engines.cache import DEFAULT_CACHE, open_cache
from engines.ceiling import matmul_ceiling
from engines.compare import compare_backends
from engines.device_memory import DeviceMemory
from engines.errors import BackendError, HalfstepError
from engines.measure import Progress as Report
from engines.open import know_costs, load_pipeline
from engines.pipeline import Pipeline
from engines.quantize import Int8Options, quantize_bundle
from engines.signing import check_signature, sign_bundle
from engines.tables import cost_table, difference_table, fraction_table, parity_table, throughput_table

_out, _err = Console(), Console(stderr=True)


def _say(error: str) -> None:
    _err.print(f"error: {error}", style="red", markup=False, soft_wrap=True, highlight=False)


class _Group(TyperGroup):
    """Errors a user should read become one sentence on stderr and exit code 1; wrong usage stays 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HalfstepError as error:
            _say(str(error))
        except OSError as error:  # a full disk, a missing permission
            _say(f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error))
        raise typer.Exit(1)


app = typer.Typer(
    cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)

BundleArgument = Annotated[Path, typer.Argument(help="Folder of the bundle.", show_default=False)]
BackendOption = Annotated[
    str,
    typer.Option(
        help="openvino, onnxruntime, torch, tensorrt, torch-cuda, torch-inductor, or auto: the fastest on CPUs."
    ),
]
PrecisionOption = Annotated[PrecisionName, typer.Option(help="Of the network body; auto is float32.")]
ThreadsOption = Annotated[int, typer.Option(min=0, help="CPU threads of one call; 0 is one per core.")]
CacheOption = Annotated[Path, typer.Option("--cache", help="Folder for compiled models and measured costs.")]
RungsOption = Annotated[str, typer.Option(help="Batch sizes, comma-separated.")]
RepeatsOption = Annotated[int, typer.Option(min=1, help="Calls per graph and batch size; the median counts.")]
BatchesOption = Annotated[int, typer.Option(min=2, help="Batches of 8 images each student draws to calibrate.")]

ALL_RUNGS = ",".join(map(str, RUNGS))


@app.command()
def sign(
    bundle: BundleArgument,
    key: Annotated[Path, typer.Option(help="Private key (PEM, elliptic curve).", show_default=False)],
) -> None:
    """Sign a bundle; the signature lies beside its folder."""
    verify_bundle(bundle)
    _out.print(f"signed in {sign_bundle(bundle, key)}", soft_wrap=True)


@app.command()
def verify(
    bundle: BundleArgument,
    public_key: Annotated[Path | None, typer.Option(help="Also demand its owner's signature (PEM).")] = None,
) -> None:
    """Check every file of a bundle against its manifest, and with a key its signature."""
    if public_key is not None:
        check_signature(bundle, public_key)
    manifest = verify_bundle(bundle).manifest
    size_mb = sum(record.bytes for record in manifest.files.values()) / 1e6
    students = ", ".join(f"{student.steps} ({student.sampler})" for student in manifest.students)
    _out.print(f"{manifest.name}: {len(manifest.files)} files, {size_mb:.1f} MB, all as the manifest says")
    _out.print(f"sizes: {', '.join(map(str, manifest.sizes))}")
    guidance = f"guidance_scale {manifest.guidance.min:g} to {manifest.guidance.max:g}"
    _out.print(f"steps: {students}; {guidance}", soft_wrap=True)
    _out.print(f"decoder: {manifest.decoder}")
    rounded = {name: spec.rounded for name, spec in manifest.graphs.items() if spec.rounded is not None}
    moved = ", ".join(f"{name} {parity.max_abs_error:.2g}" for name, parity in rounded.items())
    told = f"rounded to float16, which moved outputs by at most: {moved}" if rounded else "as they were exported"
    _out.print(f"weights: {told}", soft_wrap=True)


@app.command()
def build(
    bundle: BundleArgument,
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = 0,
    cache: CacheOption = DEFAULT_CACHE,
    rungs: RungsOption = ALL_RUNGS,
    repeats: RepeatsOption = 15,
) -> None:
    """Compile the graphs and measure what each batch size costs; later starts take both from the cache."""
    sizes = _rungs(rungs)
    verified = verify_bundle(bundle)
    folder = open_cache(cache)
    with closing(
        load_pipeline(verified, backend, precision=precision, threads=threads, cache_dir=folder, rungs=sizes)
    ) as pipeline:
        with _progress("measuring") as report:
            know_costs(pipeline, backend, precision, threads, folder, repeats=repeats, again=True, progress=report)
        _print_costs(pipeline)
    _out.print(f"kept in {folder}", soft_wrap=True)


@app.command()
def quantize(
    bundle: BundleArgument,
    destination: Annotated[Path, typer.Argument(help="Folder to write to; a bundle there is replaced.")],
    batches: BatchesOption = Int8Options.batches,
    seed: Annotated[int, typer.Option(min=0, help="Of their noise and guidance.")] = Int8Options.seed,
    name: Annotated[str, typer.Option(help="Of the new bundle.", show_default="the old one's and -int8")] = "",
) -> None:
    """Write a bundle's steps in int8, calibrated on what its students draw; its quality is not measured.

    For students of digits the gated way is python -m distill_jobs quantize.
    """
    verified = verify_bundle(bundle)
    with _progress("calibrating") as report:
        made = quantize_bundle(verified, destination, Int8Options(batches, seed, name), report)
    _out.print(parity_table(made.manifest))
    _out.print(f"wrote {destination}", soft_wrap=True)


@app.command("bench")
def bench_command(
    bundle: BundleArgument,
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = 0,
    rungs: RungsOption = ALL_RUNGS,
    repeats: RepeatsOption = 7,
) -> None:
    """Time every graph at every batch size, also against the engine's matrix product. The last line is JSON."""
    sizes, chosen = _rungs(rungs), choose_backend(backend)
    verified = verify_bundle(bundle)
    memory = DeviceMemory(chosen)
    with closing(
        load_pipeline(verified, chosen, precision=precision, threads=threads, cache_dir=None, rungs=sizes)
    ) as pipeline:
        with _progress("timing") as report:
            report("products, for the ceiling", 1)
            ceiling = matmul_ceiling(chosen, precision, threads, repeats)
            machine, command = machine_of(chosen), f"python -m engines {' '.join(sys.argv[1:])}"
            result = bench(pipeline, ceiling, repeats, threads, machine, command, memory, report)
        _print_costs(pipeline)
    _out.print(fraction_table(result))
    _out.print(throughput_table(result))
    typer.echo(result.model_dump_json())


@app.command()
def compare(
    bundle: BundleArgument,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Backend to compare; may be repeated. All installed for CPUs when left out."),
    ] = None,
    precision: PrecisionOption = "auto",
    rows: Annotated[int, typer.Option(min=2, help="Random rows per graph.")] = 16,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest absolute difference; 8-bit images may always differ by 1 level.")
    ] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, help="Of the random rows.")] = 0,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder of what build compiled, used and added to.", show_default="nothing is kept"),
    ] = None,
    rungs: RungsOption = ALL_RUNGS,
) -> None:
    """Compare backends with ONNX Runtime float32 over random rows, timesteps and w; exit 1 above tolerance.

    Also checks that rows come out bit-equal whatever their batch; on a GPU, that they differ within tolerance.
    """
    batch_sizes = _rungs(rungs)
    verified = verify_bundle(bundle)
    folder = None if cache is None else open_cache(cache)
    with _progress("comparing") as report:
        differences = compare_backends(verified, backend, precision, rows, seed, report, folder, batch_sizes)
    _out.print(difference_table(differences, tolerance))
    failed = next((difference for difference in differences if not difference.within(tolerance)), None)
    if failed is not None:
        instead = (
            "serve with --backend onnxruntime, or pass a --tolerance you accept."
            if failed.rows_equal or failed.on_gpu
            else "rows have other bytes in other batches, which no --tolerance allows; serve with a backend whose "
            "rows are bit-equal."
        )
        raise BackendError(f"{failed.engine} fails on graph {failed.call!r}: {instead}")


def _rungs(text: str) -> tuple[int, ...]:
    try:
        rungs = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        rungs = ()
    if not rungs or rungs[0] < 1:
        raise typer.BadParameter(f"{text!r} is not a list of batch sizes such as 1,2,4", param_hint="--rungs")
    return rungs


@contextmanager
def _progress(what: str) -> Iterator[Report]:
    """A spinner on stderr that names the graph and batch size at work."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=_err, transient=True) as progress:
        task = progress.add_task(what)

        def report(graph: str, rows: int) -> None:
            progress.update(task, description=f"{what} {graph}, {rows} rows")

        yield report


def _print_costs(pipeline: Pipeline) -> None:
    if pipeline.costs is not None:
        _out.print(cost_table(pipeline.engine_name, pipeline.costs))
