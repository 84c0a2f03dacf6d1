"""Timing the engines of a pipeline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from engines.cost import CostTable
from engines.examples import example_inputs
from engines.pipeline import Pipeline

Progress = Callable[[str, int], None]
"""Told the graph and batch size about to be measured."""


def measure_costs(pipeline: Pipeline, repeats: int = 5, progress: Progress | None = None) -> CostTable:
    """Median of ``repeats`` calls of every graph at every rung, after one call to warm up."""
    table: dict[str, dict[int, float]] = {}
    for graph in pipeline.manifest.graphs:
        table[graph] = {}
        for rung in pipeline.rungs:
            if progress is not None:
                progress(graph, rung)
            table[graph][rung] = _median_ms(pipeline, graph, rung, repeats)
    return CostTable(table)


def _median_ms(pipeline: Pipeline, graph: str, rung: int, repeats: int) -> float:
    engine = pipeline.engine(graph)
    inputs = example_inputs(pipeline.manifest, pipeline.tokenizer, graph, rung)
    engine.run(inputs)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        engine.run(inputs)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)
