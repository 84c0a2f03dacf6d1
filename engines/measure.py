"""Timing the engines of a pipeline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from engines.calls import Call, calls
from engines.cost import CostTable, climb
from engines.examples import example_inputs
from engines.pipeline import Pipeline
from engines.warm import warm

Progress = Callable[[str, int], None]
"""Told the call and batch size about to be measured."""

REPEAT_S = 1.0
"""A call that takes longer is repeated less often: its time varies less, and starting should not take all day."""


def measure_costs(pipeline: Pipeline, repeats: int = 5, progress: Progress | None = None) -> CostTable:
    """Median of every graph at every size and rung that fits and is worth it (``climb``), after a call to warm up.

    The pipeline gets them, and stays warm. repeats: calls each, as far as they fit in ``repeats`` times
    ``REPEAT_S``; one at least. Raises: OutOfMemoryError when no rung fits; BackendError.
    """

    def column(rung: int) -> dict[str, float]:
        ms = {}
        for call in calls(pipeline.manifest):
            if progress is not None:
                progress(str(call), rung)
            ms[str(call)] = _median_ms(pipeline, call, rung, repeats)
        return ms

    pipeline.costs = climb(pipeline.rungs, column)
    if pipeline.release():  # smaller batches gave way to larger ones; one that did not fit holds memory still
        warm(pipeline)
    return pipeline.costs


def _median_ms(pipeline: Pipeline, call: Call, rung: int, repeats: int) -> float:
    engine = pipeline.engine(call.graph)
    inputs = example_inputs(pipeline.manifest, pipeline.tokenizer, call.graph, rung, size=call.size)
    engine.run(inputs)
    times: list[float] = []
    while len(times) < repeats and sum(times) < repeats * REPEAT_S:
        started = time.perf_counter()
        engine.run(inputs)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)
