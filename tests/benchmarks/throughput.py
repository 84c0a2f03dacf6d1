"""One student on every backend: milliseconds a step and images a second at N = 4, by batch size.

The same weights everywhere, one run, contenders alternating; the last line is JSON.
Run: python -m tests.benchmarks.throughput [--batches 1,2,4,8,16,32] [--rounds 5] [--seed 0] [--tiny]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from distill_jobs.data.digits import WIDTH
from engines.bundle import Bundle
from engines.quantize import quantize_bundle
from engines.sampler import Step
from tests.benchmarks.contenders import (
    EAGER,
    EAGER_BF16,
    OPENVINO,
    OPENVINO_BF16,
    OPENVINO_INT8,
    ORT,
    PIPELINE,
    Batch,
    Contender,
    Floats,
    contenders,
    draw_batch,
)
from tests.benchmarks.page_parts import short
from tests.benchmarks.random_bundle import (
    TINY_UNET,
    UNET,
    RandomOptions,
    graph_name,
    make_random_bundle,
    plan,
    random_student,
)
from tests.benchmarks.results import Ratio, Row, Throughput, Watch

MODULE = "tests.benchmarks.throughput"
STEPS = 4
RATIOS = (
    (OPENVINO, PIPELINE),
    (OPENVINO, EAGER),
    (OPENVINO, ORT),
    (OPENVINO_BF16, EAGER_BF16),
    (OPENVINO_INT8, PIPELINE),
    (OPENVINO_INT8, EAGER),
    (OPENVINO_INT8, OPENVINO),
    (OPENVINO_INT8, OPENVINO_BF16),
)

Times = Mapping[str, Sequence[float]]
"""Seconds of each round's trajectory, by contender."""


def measure(
    bundle: Bundle,
    int8: Bundle,
    options: RandomOptions,
    batches: Sequence[int],
    rounds: int,
    advance: Callable[[], None] = lambda: None,
) -> Throughput:
    """Time every contender at every batch size.

    int8: the bundle quantized; options: those it was made with; advance: told after each size.
    """
    watch = Watch()
    unet, steps = random_student(options, STEPS), plan(STEPS).steps
    rows: list[Row] = []
    ratios: list[Ratio] = []
    everyone = contenders(unet, bundle, int8, graph_name(STEPS))
    for size in batches:
        batch = draw_batch(size, options.latent, WIDTH, options.seed)
        latents = {name: run(batch, steps) for name, run in everyone.items()}
        times = _alternate(everyone, batch, steps, rounds)
        rows += _rows(size, times, latents)
        ratios += _ratios(size, times)
        advance()
    return Throughput(
        provenance=watch.provenance(MODULE, options.seed),
        parameters=sum(p.numel() for p in unet.parameters()),
        latent=options.latent,
        steps=STEPS,
        rounds=rounds,
        rows=tuple(rows),
        ratios=tuple(ratios),
    )


def _alternate(everyone: Mapping[str, Contender], batch: Batch, steps: Sequence[Step], rounds: int) -> Times:
    """Every contender once a round, each round from another one on.

    An untimed step goes before each timed trajectory: it brings the weights back into the caches, and the other
    libraries' threads stop spinning meanwhile.
    """
    times: dict[str, list[float]] = {name: [] for name in everyone}
    for i in range(rounds):
        for name in _from(list(everyone), i):
            everyone[name](batch, steps[:1])
            begun = time.perf_counter()
            everyone[name](batch, steps)
            times[name].append(time.perf_counter() - begun)
    return times


def _from(names: list[str], start: int) -> Iterator[str]:
    return (names[(start + i) % len(names)] for i in range(len(names)))


def _rows(size: int, times: Times, latents: Mapping[str, Floats]) -> Iterator[Row]:
    for name, seconds in times.items():
        median = statistics.median(seconds)
        yield Row(
            contender=name,
            batch=size,
            ms_per_step=round(1e3 * median / STEPS, 3),
            fastest_ms=round(1e3 * min(seconds) / STEPS, 3),
            slowest_ms=round(1e3 * max(seconds) / STEPS, 3),
            images_per_s=round(size / median, 2),
            max_abs_difference=float(f"{np.abs(latents[name] - latents[EAGER]).max():.2g}"),
        )


def _ratios(size: int, times: Times) -> Iterator[Ratio]:
    for name, over in RATIOS:
        ratio = statistics.median(b / a for a, b in zip(times[name], times[over], strict=True))
        yield Ratio(contender=name, over=over, batch=size, ratio=round(ratio, 3))


def table(result: Throughput) -> Table:
    """ms per step and images/s, contenders down, batch sizes across; then the ratios."""
    million = result.parameters / 1e6
    made = Table(title=f"{million:.1f} M parameters: ms per step | images/s at N = {result.steps}, by batch size")
    made.add_column("contender")
    for size in result.batches():
        made.add_column(str(size), justify="right")
    for name in result.contenders():
        cells = [result.row(name, size) for size in result.batches()]
        made.add_row(name, *(f"{short(row.ms_per_step)} | {short(row.images_per_s)}" for row in cells))
    made.add_section()
    for name, over in dict.fromkeys((ratio.contender, ratio.over) for ratio in result.ratios):
        ratios = [r.ratio for r in result.ratios if (r.contender, r.over) == (name, over)]
        made.add_row(f"{name} / {over}", *(f"{ratio:.2f} ×" for ratio in ratios))
    return made


def report(result: Throughput) -> None:
    """The table, and one JSON line last."""
    Console(width=160).print(table(result))
    typer.echo(result.model_dump_json())


def main(
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,2,4,8,16,32",
    rounds: Annotated[int, typer.Option(min=1, help="Timed trajectories each; the median counts.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and the rows.")] = 0,
    tiny: Annotated[bool, typer.Option("--tiny", help="A toy size, to try the harness.")] = False,
) -> None:
    """Time one student on every backend. The last line is one JSON object."""
    sizes = [int(part) for part in batches.split(",")]
    options = RandomOptions(seed=seed, steps=(STEPS,), unet=TINY_UNET if tiny else UNET)
    with (
        tempfile.TemporaryDirectory(prefix="bench-throughput-") as folder,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        task = progress.add_task("batch sizes", total=len(sizes))
        bundle = make_random_bundle(Path(folder) / "random", options)
        int8 = quantize_bundle(bundle, Path(folder) / "int8")
        report(measure(bundle, int8, options, sizes, rounds, lambda: progress.advance(task)))


if __name__ == "__main__":
    typer.run(main)
