"""A real Pipeline on engines of a few lines of numpy, which a test can hold, count and break."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.base import Rows
from engines.bundle import verify_bundle
from engines.calls import calls
from engines.cost import CostTable
from engines.manifest import (
    CLEAN_ESTIMATE,
    CONDITION,
    DECODE_GRAPH,
    ENCODE_GRAPH,
    IMAGE,
    LATENT,
    NEXT_LATENT,
    TOKENS,
    GraphSpec,
    TensorSpec,
)
from engines.pipeline import Pipeline

RUNGS = (1, 2, 4, 8)
ALL = 0

Run = Callable[[Rows], dict[str, NDArray[Any]]]


class FakeEngine:
    """An EngineBackend around a function."""

    def __init__(self, spec: GraphSpec, run: Run, name: str = "fake 1 float32") -> None:
        self._spec = spec
        self.run = run
        self.name = name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.outputs

    def release(self) -> bool:
        return False

    def close(self) -> None:
        pass


class Bench:
    """A pipeline whose steps can be held back and made to fail.

    batches: (step graph, class of each row run, padding included) of every step so far; poison: a class on
    which a step raises; factor: what a step leaves of its latent; allow: let that many steps pass (``hold`` first).
    """

    def __init__(self, bundle: Path, name: str = "fake 1 float32") -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.poison: int | None = None
        self.factor = 0.5
        self._gate = threading.Semaphore(0)
        self._open = threading.Event()
        self._open.set()
        verified = verify_bundle(bundle)
        manifest = verified.manifest

        def load(graph: str) -> FakeEngine:
            runs: dict[str, Run] = {CONDITION: _condition, DECODE_GRAPH: _decode, ENCODE_GRAPH: _encode}
            return FakeEngine(manifest.graphs[graph], runs.get(graph, lambda rows: self._step(graph, rows)), name)

        self.pipeline = Pipeline(verified, load, RUNGS)
        self.pipeline.costs = CostTable({str(call): dict.fromkeys(RUNGS, 1.0) for call in calls(manifest)})

    def hold(self) -> None:
        """Steps from now on wait for ``allow``."""
        self._open.clear()
        while self._gate.acquire(blocking=False):
            pass

    def allow(self, steps: int = ALL) -> None:
        if steps == ALL:
            self._open.set()
        else:
            self._gate.release(steps)

    def _step(self, graph: str, rows: Rows) -> dict[str, NDArray[Any]]:
        classes = [int(row.argmax()) for row in rows[CONDITION]]
        self.batches.append((graph, classes))
        while not self._open.is_set() and not self._gate.acquire(timeout=0.05):
            pass
        if self.poison in classes:
            raise RuntimeError("poison")
        return {
            NEXT_LATENT: rows[LATENT] * np.float32(self.factor),
            CLEAN_ESTIMATE: rows[LATENT] * np.float32(0.25),
        }


def _condition(rows: Rows) -> dict[str, NDArray[Any]]:
    return {CONDITION: np.eye(16, dtype=np.float32)[rows[TOKENS]]}


def _decode(rows: Rows) -> dict[str, NDArray[Any]]:
    grey = np.clip(rows[LATENT][:, 0, :, :, None] * 100 + 128, 0, 255).astype(np.uint8)
    return {IMAGE: np.broadcast_to(grey, (*grey.shape[:3], 3))}


def _encode(rows: Rows) -> dict[str, NDArray[Any]]:
    grey = rows[IMAGE][:, ::8, ::8, 0].astype(np.float32)
    return {LATENT: (grey / 127.5 - 1)[:, None]}
