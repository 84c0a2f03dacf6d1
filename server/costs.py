"""What work costs on this machine, from the pipelines' measured tables."""

from __future__ import annotations

from engines.cost import CostTable
from engines.errors import BackendError
from engines.manifest import DECODE_GRAPH
from engines.pipeline import Pipeline
from server.request import DenoiseRequest


def best_rung(pipeline: Pipeline, graph: str, waiting: int) -> int:
    """The batch size to step now. Raises: BackendError when nothing was measured."""
    return _table(pipeline).best_rung(graph, waiting)


def predicted_s(pipeline: Pipeline, request: DenoiseRequest) -> float:
    """Engine seconds of a request whose rows share the most efficient batches: steps and decoding."""
    student = pipeline.student(request.steps, request.sampler)
    row_ms = request.steps * _least_ms(pipeline, student.graph) + _least_ms(pipeline, DECODE_GRAPH)
    return request.n * row_ms / 1000


def _least_ms(pipeline: Pipeline, graph: str) -> float:
    table = _table(pipeline)
    return min(table.step_ms(graph, rung) / rung for rung in pipeline.rungs)


def _table(pipeline: Pipeline) -> CostTable:
    if pipeline.costs is None:
        raise BackendError("this pipeline has no measured costs; open it with warm=True")
    return pipeline.costs
