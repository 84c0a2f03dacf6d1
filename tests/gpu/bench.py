"""Step and both decoders of a real architecture, random weights, on each engine and on diffusers, in one run.

    python -m tests.gpu.bench --model sd15 --backend tensorrt --backend torch-cuda --backend torch-inductor

Contenders alternate; the median of each counts, copies to and from the device included. Two ceilings are measured
before them: a bfloat16 matrix product and a copy. What torch.compile makes of diffusers comes last, for it takes
minutes a batch size. Whatever is found is printed at once as a JSON line, and a line of all of it before each graph
is compiled and at the end, so a run may be ended at any time. What fails is named there and left out, the rest goes
on, and the exit status is 1. Nothing is downloaded.
Rehearse where there is no GPU: python -m tests.gpu.bench --model tiny --backend onnxruntime --precision float32
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

import torch
import typer

from engines.backends.base import Precision
from engines.backends.load import ON_GPU, BackendName, choose_backend, choose_precision, machine_of
from engines.errors import BackendError
from tests.gpu.architectures import ARCHITECTURES, Architecture, Graph
from tests.gpu.contenders import Call, Ready, diffusers_contender, engine_contenders, export
from tests.gpu.found import Found, err, summary

WARM_S = 0.3
"""Least time that a contender is run before it is timed: the clocks of an idle GPU take a while to rise."""

GRAPHS: tuple[Graph, ...] = get_args(Graph)


class Asked(NamedTuple):
    """What is to be measured. rungs: batch sizes, ascending. repeats: calls each. work: of ``main``."""

    model: str
    graphs: tuple[Graph, ...]
    rungs: tuple[int, ...]
    precision: Precision
    repeats: int
    work: Path | None

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.model]


def main(
    model: Annotated[str, typer.Option(help="sd15, sdxl or tiny.")] = "sd15",
    backend: Annotated[list[str] | None, typer.Option(help="May be repeated; torch-cuda when left out.")] = None,
    precision: Annotated[
        Precision, typer.Option(help="Of the network body, in engines and in diffusers.")
    ] = "bfloat16",
    rungs: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,4,8",
    repeats: Annotated[int, typer.Option(min=1, help="Calls each; the median counts.")] = 7,
    compiled: Annotated[bool, typer.Option(help="Also diffusers under torch.compile.")] = True,
    graph: Annotated[
        list[str] | None, typer.Option(help=f"May be repeated; all when left out: {', '.join(GRAPHS)}.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Keep the exported graphs, and what engines are built, for the next run.")
    ] = None,
) -> None:
    """Measure graph by graph, printing a JSON line for all that is found; the last has all. Exit 1 for failures."""
    check_known("--model", [model], tuple(ARCHITECTURES))
    check_known("--graph", graph or (), GRAPHS)
    graphs = tuple(name for name in GRAPHS if graph is None or name in graph)
    asked = Asked(model, graphs, batch_sizes(rungs), precision, repeats, work)
    backends, machines = chosen(backend or ["torch-cuda"], precision)
    found = Found(next((name for name in backends if name in ON_GPU), next(iter(backends))))
    flops = asked.architecture.step_flops()
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    command = f"python -m tests.gpu.bench {' '.join(sys.argv[1:])}".strip()
    told = {"model": model, "machines": machines, **versions, "precision": precision, "seed": 0, "command": command}
    with found.going_on("ceilings"):
        found.ceilings = measured_ceilings(found.torch_device)
        typer.echo(json.dumps({"ceilings": found.ceilings}))
    measure_engines(found, asked, backends)
    for name in graphs if compiled else ():
        typer.echo(json.dumps({**told, **summary(found, flops)}))
        measure_compiled(found, asked, name)
    typer.echo(json.dumps({**told, **summary(found, flops)}))
    if found.failures:
        raise typer.Exit(1)


def check_known(option: str, values: Sequence[str], known: Sequence[str]) -> None:
    """Raises: typer.BadParameter naming the first that is unknown."""
    for value in values:
        if value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}", param_hint=option)


def batch_sizes(text: str) -> tuple[int, ...]:
    """Ascending. Raises: typer.BadParameter."""
    try:
        sizes = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        sizes = (0,)
    if sizes[0] < 1:
        raise typer.BadParameter(f"{text!r} is not a list of batch sizes such as 1,4,8", param_hint="--rungs")
    return sizes


def chosen(
    names: Sequence[str], precision: Precision
) -> tuple[dict[BackendName, Precision], dict[BackendName, str]]:
    """Precision and machine of each backend. Raises: typer.Exit where one is unknown, or cannot run here."""
    try:
        known = [choose_backend(name) for name in names]
        backends = {name: choose_precision(name, precision) for name in known}
        return backends, {name: machine_of(name) for name in known}
    except BackendError as error:
        err.print(f"error: {error}")
        raise typer.Exit(1) from None


def measure_engines(found: Found, asked: Asked, backends: Mapping[BackendName, Precision]) -> None:
    """Each graph on all backends, and on diffusers as it is."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in asked.graphs:
            with found.going_on(name), ExitStack() as stack:
                file, spec = export(asked.architecture, asked.model, name, asked.work or Path(scratch))
                contenders = engine_contenders(backends, file, spec, asked.rungs, found.engines, stack, asked.work)
                contenders |= diffusers_contender(asked.architecture, name, found.torch_device, asked.precision)
                measure(found, name, contenders, asked.rungs, asked.repeats)


def measure_compiled(found: Found, asked: Asked, graph: Graph) -> None:
    """One graph on diffusers under torch.compile."""
    with found.going_on(f"{graph}, compiled"):
        contender = diffusers_contender(
            asked.architecture, graph, found.torch_device, asked.precision, compiled=True
        )
        measure(found, graph, contender, asked.rungs, asked.repeats)


def measure(
    found: Found, graph: str, contenders: Mapping[str, Callable[[], Ready]], rungs: Sequence[int], repeats: int
) -> None:
    """Load the contenders one after another, then time them in turns, batch size by batch size.

    What is found is printed after each, with all that was found of the graph before. One that fails is out of what
    follows.
    """
    loaded: dict[str, Ready] = {}
    for name, load in contenders.items():
        with found.going_on(f"{graph} on {name}"), found.memory_of(name, graph):
            loaded[name] = load()
    for rung in rungs:
        calls: dict[str, Call] = {}
        for name, ready in loaded.items():
            with found.going_on(f"{graph} on {name}, {rung} rows"), found.memory_of(name, graph):
                call = ready(rung)
                call()
                calls[name] = call
        loaded = {name: loaded[name] for name in calls}
        with found.going_on(f"timing {graph}, {rung} rows"):
            for name, figure in medians(calls, repeats).items():
                found.ms.setdefault(name, {}).setdefault(graph, {})[rung] = figure
        typer.echo(json.dumps(found.of(graph)))


def medians(calls: Mapping[str, Call], repeats: int) -> dict[str, float]:
    """Milliseconds of each, taken in turns after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        began = time.perf_counter()
        call()
        while time.perf_counter() - began < WARM_S:
            call()
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(taken) for name, taken in times.items()}


def measured_ceilings(device: str) -> dict[str, float]:
    """What the machine does at best: a square bfloat16 product (float32 on a CPU), and a copy within its memory."""
    side, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(1 << (31 if device == "cuda" else 25), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def done(work: Callable[[], Any]) -> Call:
        def call() -> None:
            work()
            if device == "cuda":
                torch.cuda.synchronize()

        return call

    ms = medians({"product": done(lambda: a @ b), "copy": done(lambda: target.copy_(source))}, 9)
    return {
        "matmul_tflop_s": 2 * side**3 / (ms["product"] * 1e9),
        "copy_gb_s": 2 * source.numel() / (ms["copy"] * 1e6),
    }


if __name__ == "__main__":
    typer.run(main)
