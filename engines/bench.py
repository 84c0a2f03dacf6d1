"""What a bundle costs on one backend: time per call, images per second, memory."""

from __future__ import annotations

import platform
import statistics
import time

import numpy as np
import psutil

from engines.calls import call_of, calls, row_shapes
from engines.device_memory import DeviceMemory
from engines.flops import product_flops
from engines.manifest import CONDITION_GRAPH, DECODE_GRAPH, Frozen, Size, StudentSpec
from engines.measure import Progress, measure_costs
from engines.pipeline import Pipeline


class Throughput(Frozen):
    """One student at its best batch size. size: of its images."""

    size: str = ""
    steps: int
    sampler: str
    batch: int
    images_per_s: float


class BenchResult(Frozen):
    """All figures of a run.

    ms: median by call (``engines.calls``) and batch size. flop: arithmetic of one row of each, products alone;
    ceiling_gflop_s: of square products in the same engine; fraction: what of it each call reaches. throughput: each
    student, what those medians add up to; generate: the default student, whole batches timed from prompt to image.
    repeats: of a call, at most: a long one has as many as fit into as many seconds.
    host_memory_mb: what the process holds of the machine's memory at the end; device_memory_mb: what its engines
    hold of the GPU's between calls, None where they run on the CPU.
    """

    bundle: str
    engine: str
    machine: str
    python: str
    numpy: str
    threads: int
    repeats: int
    command: str
    ms: dict[str, dict[int, float]]
    flop: dict[str, int]
    ceiling_gflop_s: float
    fraction: dict[str, dict[int, float]]
    throughput: tuple[Throughput, ...]
    generate: Throughput
    host_memory_mb: float
    device_memory_mb: float | None


def bench(
    pipeline: Pipeline,
    ceiling_gflop_s: float,
    repeats: int,
    threads: int,
    machine: str,
    command: str,
    memory: DeviceMemory,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure a loaded pipeline, which gets the costs found.

    ceiling_gflop_s: ``engines.ceiling``'s; repeats: calls per graph and batch size, fewer of long ones; machine:
    what its engines run on; memory: made before they were loaded. Raises: BackendError when the arithmetic of a
    graph cannot be counted.
    """
    graphs = pipeline.manifest.graphs
    flop = {
        str(call): product_flops(
            pipeline.bundle.graph_file(call.graph), row_shapes(graphs[call.graph], (call.size,))[0]
        )
        for call in calls(pipeline.manifest)
    }
    ms = {call: dict(costs) for call, costs in measure_costs(pipeline, repeats, progress).ms.items()}
    return BenchResult(
        bundle=pipeline.manifest.name,
        engine=pipeline.engine_name,
        machine=machine,
        python=platform.python_version(),
        numpy=np.__version__,
        threads=threads,
        repeats=repeats,
        command=command,
        ms=ms,
        flop=flop,
        ceiling_gflop_s=ceiling_gflop_s,
        fraction={
            call: {rung: rung * flop[call] / (1e6 * taken * ceiling_gflop_s) for rung, taken in costs.items()}
            for call, costs in ms.items()
        },
        throughput=tuple(
            _best(pipeline, student, size)
            for size in pipeline.manifest.sizes
            for student in pipeline.manifest.students
        ),
        generate=_generate(pipeline, repeats),
        host_memory_mb=psutil.Process().memory_info().rss / 1e6,
        device_memory_mb=memory.taken_mb(),
    )


def _best(pipeline: Pipeline, student: StudentSpec, size: Size) -> Throughput:
    """The batch size at which condition, steps and decode of whole batches give most images per second."""
    rates = {rung: 1e3 * rung / _image_ms(pipeline, student, size, rung) for rung in pipeline.rungs}
    batch = max(rates, key=lambda rung: rates[rung])
    return _throughput(student, size, batch, rates[batch])


def _throughput(student: StudentSpec, size: Size, batch: int, rate: float) -> Throughput:
    return Throughput(size=str(size), steps=student.steps, sampler=student.sampler, batch=batch, images_per_s=rate)


def _image_ms(pipeline: Pipeline, student: StudentSpec, size: Size, rung: int) -> float:
    costs = pipeline.costs
    assert costs is not None
    condition, step, decode = (
        costs.step_ms(str(call_of(pipeline.manifest, graph, size)), rung)
        for graph in (CONDITION_GRAPH, student.graph, DECODE_GRAPH)
    )
    return condition + student.steps * step + decode


def _generate(pipeline: Pipeline, repeats: int) -> Throughput:
    """At the first size."""
    student, size = pipeline.student(None), pipeline.manifest.sizes[0]
    batch = _best(pipeline, student, size).batch
    prompts, seeds = [pipeline.tokenizer.known()[0]] * batch, list(range(batch))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        pipeline.generate(prompts, pipeline.manifest.guidance.default, seeds)
        times.append(time.perf_counter() - started)
    return _throughput(student, size, batch, batch / statistics.median(times))
