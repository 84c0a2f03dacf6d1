"""Step and both decoders of a real architecture, random weights, on each engine and on diffusers, in one run.

    python -m tests.gpu.bench --model sd15 --backend tensorrt --backend torch-cuda

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from rich.console import Console

from engines.backends.base import Precision
from engines.backends.load import ON_GPU, BackendName, choose_backend, choose_precision, machine_of
from engines.device_memory import DeviceMemory
from engines.errors import BackendError
from tests.gpu.architectures import ARCHITECTURES, Graph
from tests.gpu.contenders import Call, Ready, diffusers_contender, engine_contenders, export

STEPS = 4
WARM_S = 0.3
"""Least time that a contender is run before it is timed: the clocks of an idle GPU take a while to rise."""

GRAPHS: tuple[Graph, ...] = get_args(Graph)
DECODES: tuple[Graph, ...] = ("decode", "decode_tiny")
_err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
Figures = dict[str, dict[str, dict[int, float]]]
"""Milliseconds by contender, graph and batch size."""


@dataclass
class Found:
    """What a run has found so far, of the contenders on ``device``.

    device_mb: by contender and graph, what it took of the GPU's memory for all batch sizes and keeps between calls;
    empty on a CPU. failures: what is missing, and why.
    """

    device: BackendName
    engines: dict[str, str] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    ms: Figures = field(default_factory=dict)
    device_mb: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """Say that this begins. Where it fails, keep the reason and go on."""
        _err.print(f"{time.monotonic() - self.started:6.0f} s  {what}")
        try:
            yield
        except Exception as error:  # torch and the libraries raise what they like
            self.failures[what] = f"{type(error).__name__}: {error}"
            _err.print(f"FAILED: {what}: {self.failures[what]}")

    @contextmanager
    def memory_of(self, contender: str, graph: str) -> Iterator[None]:
        """What this takes of the device's memory counts as the contender's."""
        memory = DeviceMemory(self.device)
        yield
        if (taken := memory.taken_mb()) is not None:
            graphs = self.device_mb.setdefault(contender, {})
            graphs[graph] = graphs.get(graph, 0.0) + taken

    def of(self, graph: str) -> dict[str, Any]:
        """ms and device_mb of one graph."""
        kept = {"ms": self.ms, "device_mb": self.device_mb}
        return {
            "graph": graph,
            **{key: {name: of[graph] for name, of in found.items() if graph in of} for key, found in kept.items()},
        }


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
    architecture, sizes = ARCHITECTURES[model], batch_sizes(rungs)
    wanted = tuple(name for name in GRAPHS if graph is None or name in graph)
    try:
        names = [choose_backend(name) for name in backend or ["torch-cuda"]]
        backends = {name: choose_precision(name, precision) for name in names}
        machines = {name: machine_of(name) for name in names}
    except BackendError as error:
        _err.print(f"error: {error}")
        raise typer.Exit(1) from None
    found = Found(next((name for name in names if name in ON_GPU), names[0]))
    device = "cuda" if found.device in ON_GPU else "cpu"
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    command = f"python -m tests.gpu.bench {' '.join(sys.argv[1:])}".strip()
    told = {"model": model, "machines": machines, **versions, "precision": precision, "seed": 0, "command": command}
    flops = architecture.step_flops()
    with found.going_on("ceilings"):
        found.ceilings = measured_ceilings(device)
        typer.echo(json.dumps({"ceilings": found.ceilings}))
    with tempfile.TemporaryDirectory() as scratch:
        for name in wanted:
            with found.going_on(name), ExitStack() as stack:
                file, spec = export(architecture, model, name, work or Path(scratch))
                contenders = engine_contenders(backends, file, spec, sizes, found.engines, stack, work)
                contenders |= diffusers_contender(architecture, name, device, precision)
                measure(found, name, contenders, sizes, repeats)
    for name in wanted if compiled else ():
        typer.echo(json.dumps({**told, **summary(found, flops)}))
        with found.going_on(f"{name}, compiled"):
            measure(found, name, diffusers_contender(architecture, name, device, precision, True), sizes, repeats)
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


def summary(found: Found, flops: int) -> dict[str, Any]:
    """Everything found, and what follows from it as far as it is there. flops: of a row's step."""
    steps = {name: graphs["step"] for name, graphs in found.ms.items() if "step" in graphs}
    best = found.ceilings.get("matmul_tflop_s")
    return {
        "engines": found.engines,
        "step_tflop": flops / 1e12,
        "ceilings": found.ceilings,
        "ms": found.ms,
        "device_mb": found.device_mb or None,
        "step_fraction": {
            name: {r: r * flops / (taken * 1e9) / best for r, taken in step.items()}
            for name, step in steps.items()
            if best is not None
        },
        "images_per_s": {
            name: {
                decode: {
                    r: 1e3 * r / (STEPS * taken + found.ms[name][decode][r])
                    for r, taken in step.items()
                    if r in found.ms[name][decode]
                }
                for decode in DECODES
                if decode in found.ms[name]
            }
            for name, step in steps.items()
        },
        "failures": found.failures,
    }


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
