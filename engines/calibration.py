"""What step graphs meet in service: the inputs along trajectories that the students themselves draw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.base import EngineBackend, OfGraph, Rows
from engines.backends.load import load_backend
from engines.bundle import Bundle
from engines.manifest import GraphSpec, Size, StudentSpec
from engines.measure import Progress
from engines.pipeline import Pipeline

Arrays = dict[str, NDArray[Any]]

BATCH = 8
"""Rows of a recorded call."""


@dataclass
class Recorded:
    """Calls of one graph, in the order they were made: each BATCH rows. batches: which trajectory each is of."""

    inputs: list[Arrays] = field(default_factory=list)
    outputs: list[Arrays] = field(default_factory=list)
    batches: list[tuple[int, int]] = field(default_factory=list)


class _Recorder(OfGraph):
    """An engine that keeps what it is given and gives back."""

    def __init__(self, engine: EngineBackend, spec: GraphSpec, kept: Recorded) -> None:
        self._engine, self._spec, self._kept = engine, spec, kept

    @property
    def name(self) -> str:
        return self._engine.name

    def run(self, rows: Rows) -> Arrays:
        outputs = self._engine.run(rows)
        self._kept.inputs.append(dict(rows))
        self._kept.outputs.append(outputs)
        return outputs

    def close(self) -> None:
        self._engine.close()


def record_trajectories(
    bundle: Bundle, batches: int, seed: int, progress: Progress | None = None
) -> dict[str, Recorded]:
    """By step graph, the calls that draw this many batches of images with every student, at least two of each size.

    Prompts are the known ones in turn, and so are sizes; noise and guidance_scale come from ``seed``, the scale
    from the whole trained range. Raises: BackendError.
    """
    kept: dict[str, Recorded] = {}

    def recording(graph: str) -> EngineBackend:
        engine = load_backend("auto", bundle, graph)
        if graph not in {student.graph for student in bundle.manifest.students}:
            return engine
        return _Recorder(engine, bundle.manifest.graphs[graph], kept.setdefault(graph, Recorded()))

    pipeline = Pipeline(bundle, recording, rungs=(BATCH,))
    rng = np.random.default_rng(seed)
    for student in bundle.manifest.students:
        for number in range(max(batches, 2 * len(bundle.manifest.sizes))):
            if progress is not None:
                progress(student.graph, number * BATCH)
            size = bundle.manifest.sizes[number % len(bundle.manifest.sizes)]
            _draw(pipeline, student, size, number * BATCH, rng)
            calls = kept[student.graph]
            calls.batches += [(student.steps, number)] * (len(calls.inputs) - len(calls.batches))
    pipeline.close()
    return kept


def _draw(pipeline: Pipeline, student: StudentSpec, size: Size, first: int, rng: np.random.Generator) -> None:
    """One batch to its end. first: number of its first image, which decides the prompts."""
    known, guidance = pipeline.tokenizer.known(), pipeline.manifest.guidance
    conditions = pipeline.condition([known[(first + i) % len(known)] for i in range(BATCH)])
    rows = [
        pipeline.start(condition, rng.uniform(guidance.min, guidance.max), int(rng.integers(2**53)), student, size)
        for condition in conditions
    ]
    while not rows[0].done:
        pipeline.step(rows)
