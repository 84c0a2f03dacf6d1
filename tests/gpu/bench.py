"""Step and both decoders of a real architecture, random weights, on each engine and on diffusers, in one run.

    python -m tests.gpu.bench --model sd15 --backend tensorrt --backend torch-cuda

Contenders alternate; the median of each counts, copies to and from the device included. Two ceilings are measured
beside them: a bfloat16 matrix product and a copy. The last line is one JSON object. Nothing is downloaded.
Rehearse where there is no GPU: python -m tests.gpu.bench --model tiny --backend onnxruntime --precision float32
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

from distill_jobs.onnx_export import write_graph
from engines.backends.base import EngineBackend, Precision
from engines.backends.load import ON_GPU, choose_backend, choose_precision, machine_of
from engines.manifest import GraphSpec, Parity, TensorSpec
from tests.gpu.architectures import ARCHITECTURES, Architecture
from tests.gpu.loading import load_file

STEPS = 4
DECODES = ("decode", "decode_tiny")
_err = Console(stderr=True)
Call = Callable[[], None]
Figures = dict[str, dict[str, dict[int, float]]]
"""Milliseconds by contender, graph and batch size."""


def main(
    model: Annotated[str, typer.Option(help="sd15, sdxl or tiny.")] = "sd15",
    backend: Annotated[list[str] | None, typer.Option(help="May be repeated; torch-cuda when left out.")] = None,
    precision: Annotated[
        Precision, typer.Option(help="Of the network body, in engines and in diffusers.")
    ] = "bfloat16",
    rungs: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,4,8",
    repeats: Annotated[int, typer.Option(min=1, help="Calls each; the median counts.")] = 7,
    compiled: Annotated[bool, typer.Option(help="Also diffusers under torch.compile.")] = True,
    work: Annotated[Path | None, typer.Option(help="Keep the exported graphs here, for the next run.")] = None,
) -> None:
    """Measure, print a line for each contender, then the JSON object."""
    architecture, sizes = ARCHITECTURES[model], tuple(sorted(int(part) for part in rungs.split(",")))
    names = [choose_backend(name) for name in backend or ["torch-cuda"]]
    machines = {name: machine_of(name) for name in names}
    device = "cuda" if any(name in ON_GPU for name in names) else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        files = export(architecture, model, work or Path(scratch))
        ms: Figures = {}
        for graph, (file, spec) in files.items():
            engines = [load_file(name, file, spec, choose_precision(name, precision), sizes) for name in names]
            for rung in sizes:
                calls = {engine.name: engine_call(engine, spec, rung) for engine in engines}
                calls |= diffusers_calls(architecture, graph, rung, device, precision, compiled)
                for contender, figure in medians(calls, repeats).items():
                    ms.setdefault(contender, {}).setdefault(graph, {})[rung] = figure
            for engine in engines:
                engine.close()
    for name, graphs in ms.items():
        _err.print(f"{name}: {graphs}", highlight=False, soft_wrap=True)
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    command = f"python -m tests.gpu.bench {' '.join(sys.argv[1:])}".strip()
    told = {"model": model, "machines": machines, **versions, "precision": precision, "seed": 0, "command": command}
    found = summary(ms, architecture.step_flops(), measured_ceilings(device))
    typer.echo(json.dumps({**told, **found}))


def summary(ms: Figures, flops: int, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """ms, and what follows. flops: of a row's step."""
    return {
        "step_tflop": flops / 1e12,
        "ceilings": ceilings,
        "ms": ms,
        "step_fraction": {
            name: {r: r * flops / (taken * 1e9) / ceilings["matmul_tflop_s"] for r, taken in graphs["step"].items()}
            for name, graphs in ms.items()
        },
        "images_per_s": {
            name: {
                decode: {r: 1e3 * r / (STEPS * step + graphs[decode][r]) for r, step in graphs["step"].items()}
                for decode in DECODES
            }
            for name, graphs in ms.items()
        },
    }


def export(architecture: Architecture, model: str, folder: Path) -> dict[str, tuple[Path, GraphSpec]]:
    """The step and decode graphs as bundles hold them, written where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    side, rows, step = architecture.side, architecture.packing.rows, architecture.step
    made: dict[str, tuple[nn.Module, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]] = {
        "step": (step, step.inputs(side, side, rows), step.outputs(side, side))
    }
    for name in DECODES:
        decode = getattr(architecture, name)
        made[name] = decode, decode.inputs(side, side), decode.outputs(side, side)
    files = {}
    for name, (module, inputs, outputs) in made.items():
        file = folder / f"{model}-{name}.onnx"
        if not file.exists():
            example = [torch.from_numpy(array) for array in random_inputs(inputs, 2).values()]
            write_graph(module.requires_grad_(False), example, inputs, outputs, file)
        parity = Parity(reference="none", max_abs_error=0, mean_abs_error=0, rows=0)
        files[name] = file, GraphSpec(file=file.name, inputs=inputs, outputs=outputs, parity=parity)
    return files


def random_inputs(specs: tuple[TensorSpec, ...], rows: int) -> dict[str, NDArray[Any]]:
    """Standard normal rows, and times within the schedule."""
    rng = np.random.default_rng(0)
    drawn = {spec.name: rng.standard_normal((rows, *spec.shape[1:]), dtype=np.float32) for spec in specs}
    return {name: np.abs(array) * 100 if name == "timestep" else array for name, array in drawn.items()}


def engine_call(engine: EngineBackend, spec: GraphSpec, rung: int) -> Call:
    """A whole call, as a server makes it."""
    inputs = random_inputs(spec.inputs, rung)

    def call() -> None:
        engine.run(inputs)

    return call


def diffusers_calls(
    architecture: Architecture, graph: str, rung: int, device: str, precision: Precision, compiled: bool
) -> dict[str, Call]:
    """The stock network alone, its inputs on the device already: eager, and compiled."""
    dtype: torch.dtype = getattr(torch, precision)
    module = architecture.network(graph).to(device, dtype, memory_format=torch.channels_last)
    latent = torch.randn(rung, 4, architecture.side, architecture.side, device=device, dtype=dtype)
    arguments: dict[str, Any] = {}
    if graph == "step":
        told = architecture.packing.unpack(torch.randn(rung, architecture.packing.rows, architecture.packing.width))
        told = told.to(device)
        arguments = {
            "timestep": torch.full((rung,), 500, device=device),
            "encoder_hidden_states": told.tokens.to(dtype),
            "timestep_cond": torch.randn(rung, 256, device=device, dtype=dtype),
        }
        if told.pooled is not None and told.time_ids is not None:
            arguments["added_cond_kwargs"] = {
                "text_embeds": told.pooled.to(dtype),
                "time_ids": told.time_ids.to(dtype),
            }
    networks = {"diffusers eager": module}
    if compiled:
        networks["diffusers compiled"] = torch.compile(module, mode="max-autotune")

    def call_of(network: Any) -> Call:
        def call() -> None:
            with torch.inference_mode():
                network(latent, **arguments)
            if device == "cuda":
                torch.cuda.synchronize()

        return call

    return {f"{name} {precision}": call_of(network) for name, network in networks.items()}


def medians(calls: Mapping[str, Call], repeats: int) -> dict[str, float]:
    """Milliseconds of each, taken in turns after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(2):
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
