"""Timing the engines of a pipeline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from engines.calls import Call, calls
from engines.cost import CostTable
from engines.examples import example_inputs
from engines.pipeline import Pipeline

Progress = Callable[[str, int], None]
"""Told the call and batch size about to be measured."""


def measure_costs(pipeline: Pipeline, repeats: int = 5, progress: Progress | None = None) -> CostTable:
    """Median of ``repeats`` calls of every graph at every size and rung, after one to warm up."""
    table: dict[str, dict[int, float]] = {}
    for call in calls(pipeline.manifest):
        costs = table.setdefault(str(call), {})
        for rung in pipeline.rungs:
            if progress is not None:
                progress(str(call), rung)
            costs[rung] = _median_ms(pipeline, call, rung, repeats)
    return CostTable(table)


def _median_ms(pipeline: Pipeline, call: Call, rung: int, repeats: int) -> float:
    engine = pipeline.engine(call.graph)
    inputs = example_inputs(pipeline.manifest, pipeline.tokenizer, call.graph, rung, size=call.size)
    engine.run(inputs)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        engine.run(inputs)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)
