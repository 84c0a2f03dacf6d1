"""What work costs, from tables measured where the engines run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from engines.calls import call_of
from engines.cost import CostTable
from engines.errors import BackendError
from engines.manifest import DECODE_GRAPH, ENCODE_GRAPH, BundleManifest
from engines.pipeline import Pipeline, find_student
from server.request import DenoiseRequest, Frozen, find_size

UNKNOWN_ROW_S = 1.0
"""Predicted for an image of a model, or a size of it, that no worker has ever offered here."""


class Offer(Frozen):
    """A model a worker has ready. engine: as responses report it; ms: median, by call (``engines.calls``), rung."""

    engine: str
    ms: dict[str, dict[int, float]]

    @classmethod
    def of(cls, pipeline: Pipeline) -> Self:
        """Raises: BackendError when nothing was measured."""
        table = _table(pipeline)
        return cls(engine=pipeline.engine_name, ms={call: dict(costs) for call, costs in table.ms.items()})

    @property
    def costs(self) -> CostTable:
        return CostTable(self.ms)


class CostBook:
    """Who offers what, as last heard. workers: how many there are."""

    def __init__(self) -> None:
        self.workers = 0
        self._ready: list[frozenset[str]] = []
        self._tables: dict[str, CostTable] = {}

    def update(self, offers: Mapping[str, Mapping[str, Offer]]) -> None:
        """offers: by worker, then by model. What was known of models nobody offers now is kept."""
        self.workers = len(offers)
        self._ready = [frozenset(models) for models in offers.values()]
        for models in offers.values():
            self._tables.update({name: offer.costs for name, offer in models.items()})

    def sharing(self, model: str) -> tuple[int, frozenset[str]]:
        """How many workers have a model ready, and all the models between which those divide their time."""
        those = [ready for ready in self._ready if model in ready]
        return len(those), frozenset({model}).union(*those)

    def predicted_s(self, manifest: BundleManifest, request: DenoiseRequest) -> float:
        """Engine seconds of a request whose rows share the most efficient batches: steps, decoding and encoding."""
        table = self._tables.get(manifest.name, CostTable({}))
        student, size = find_student(manifest, request.steps, request.sampler), find_size(manifest, request)

        def row_ms(graph: str) -> float:
            return table.row_ms(str(call_of(manifest, graph, size)))

        try:
            image_ms = request.network_steps * row_ms(student.graph) + row_ms(DECODE_GRAPH)
            encode_ms = 0.0 if request.image is None else row_ms(ENCODE_GRAPH)
        except KeyError:
            return request.n * UNKNOWN_ROW_S
        return (request.n * image_ms + encode_ms) / 1000


def best_rung(pipeline: Pipeline, call: str, waiting: int) -> int:
    """The batch size to step now. Raises: BackendError when nothing was measured."""
    return _table(pipeline).best_rung(call, waiting)


def _table(pipeline: Pipeline) -> CostTable:
    if pipeline.costs is None:
        raise BackendError("this pipeline has no measured costs; open it with warm=True")
    return pipeline.costs
