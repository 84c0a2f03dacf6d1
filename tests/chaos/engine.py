"""The engine process of a chaos worker: fake steps of some milliseconds, and a nine that takes the process down."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.base import Rows
from engines.bundle import verify_bundle
from engines.cost import CostTable
from engines.manifest import CLEAN_ESTIMATE, CONDITION, DECODE_GRAPH, IMAGE, LATENT, NEXT_LATENT, TOKENS
from engines.pipeline import Pipeline
from server.costs import Offer
from server.engine_child import main
from server.settings import Settings
from tests.support.fake_engines import RUNGS, FakeEngine

STEP_S = 0.015
POISON = 9


def load(settings: Settings, known: Mapping[str, Offer]) -> Mapping[str, Pipeline]:
    bundle = verify_bundle(settings.bundles[0])
    runs = {CONDITION: _condition, DECODE_GRAPH: _decode}
    pipeline = Pipeline(
        bundle, lambda graph: FakeEngine(bundle.manifest.graphs[graph], runs.get(graph, _step)), RUNGS
    )
    pipeline.costs = CostTable({graph: dict.fromkeys(RUNGS, 1000 * STEP_S) for graph in bundle.manifest.graphs})
    return {bundle.manifest.name: pipeline}


def _condition(rows: Rows) -> dict[str, NDArray[Any]]:
    return {CONDITION: np.eye(16, dtype=np.float32)[rows[TOKENS]]}


def _step(rows: Rows) -> dict[str, NDArray[Any]]:
    time.sleep(STEP_S)
    classes = rows[CONDITION].reshape(len(rows[CONDITION]), -1).argmax(axis=1)
    if POISON in classes:
        os.kill(os.getpid(), signal.SIGSEGV)
    scale = (1 + classes.astype(np.float32) / 16).reshape(-1, 1, 1, 1)
    return {NEXT_LATENT: rows[LATENT] * scale / 2, CLEAN_ESTIMATE: rows[LATENT] * scale / 4}


def _decode(rows: Rows) -> dict[str, NDArray[Any]]:
    grey = np.clip(rows[LATENT][:, 0, :, :, None] * 100 + 128, 0, 255).astype(np.uint8)
    return {IMAGE: np.broadcast_to(grey, (*grey.shape[:3], 3))}


if __name__ == "__main__":
    main(load)
