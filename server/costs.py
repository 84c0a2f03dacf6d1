"""What work costs, from tables measured where the engines run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from engines.cost import CostTable
from engines.errors import BackendError
from engines.manifest import DECODE_GRAPH, ENCODE_GRAPH, BundleManifest
from engines.pipeline import Pipeline, find_student
from server.request import DenoiseRequest, Frozen

UNKNOWN_ROW_S = 1.0
"""Predicted for an image of a model that no worker has ever offered here."""


class Offer(Frozen):
    """A model a worker has ready. engine: as responses report it; ms: by graph and rung, median of a call."""

    engine: str
    ms: dict[str, dict[int, float]]

    @classmethod
    def of(cls, pipeline: Pipeline) -> Self:
        """Raises: BackendError when nothing was measured."""
        table = _table(pipeline)
        return cls(engine=pipeline.engine_name, ms={graph: dict(costs) for graph, costs in table.ms.items()})

    @property
    def costs(self) -> CostTable:
        return CostTable(self.ms)


class CostBook:
    """Who offers what, as last heard. workers: how many there are."""

    def __init__(self) -> None:
        self.workers = 0
        self._tables: dict[str, CostTable] = {}

    def update(self, offers: Mapping[str, Mapping[str, Offer]]) -> None:
        """offers: by worker, then by model. What was known of models nobody offers now is kept."""
        self.workers = len(offers)
        for models in offers.values():
            self._tables.update({name: offer.costs for name, offer in models.items()})

    def predicted_s(self, manifest: BundleManifest, request: DenoiseRequest) -> float:
        """Engine seconds of a request whose rows share the most efficient batches: steps, decoding and encoding."""
        table = self._tables.get(manifest.name)
        if table is None:
            return request.n * UNKNOWN_ROW_S
        student = find_student(manifest, request.steps, request.sampler)
        row_ms = request.network_steps * table.row_ms(student.graph) + table.row_ms(DECODE_GRAPH)
        encode_ms = 0.0 if request.image is None else table.row_ms(ENCODE_GRAPH)
        return (request.n * row_ms + encode_ms) / 1000


def best_rung(pipeline: Pipeline, graph: str, waiting: int) -> int:
    """The batch size to step now. Raises: BackendError when nothing was measured."""
    return _table(pipeline).best_rung(graph, waiting)


def _table(pipeline: Pipeline) -> CostTable:
    if pipeline.costs is None:
        raise BackendError("this pipeline has no measured costs; open it with warm=True")
    return pipeline.costs
