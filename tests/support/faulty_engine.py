"""The engine process with a model that takes it down; run as a module in place of the real child."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.base import EngineBackend, Rows
from engines.manifest import CONDITION, LATENT, NEXT_LATENT
from engines.pipeline import Pipeline
from server.costs import Offer
from server.engine_child import main
from server.loading import load_pipelines
from server.settings import Settings


def segfault() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def killed_for_memory() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(3)


def hang() -> None:
    while True:
        time.sleep(60)


def refuse() -> None:
    raise RuntimeError("poison")


def lose_device() -> None:
    lost.append(True)


lost: list[bool] = []
"""Not empty once the device is lost: no call returns any more."""

FAULTS: dict[int, Callable[[], None]] = {
    0: lose_device,
    5: leave,
    6: refuse,
    7: segfault,
    8: hang,
    9: killed_for_memory,
}
"""What a step does when a row of this class is in it."""

NAN_CLASS = 4


def load(settings: Settings, known: Mapping[str, Offer]) -> Mapping[str, Pipeline]:
    pipelines = load_pipelines(settings, known)
    for pipeline in pipelines.values():
        pipeline.wrap_engines(_faulty)
    return pipelines


def _faulty(graph: str, engine: EngineBackend) -> EngineBackend:
    def run(rows: Rows) -> dict[str, NDArray[Any]]:
        if CONDITION not in rows or LATENT not in rows:
            return engine.run(rows)
        classes = rows[CONDITION].reshape(len(rows[CONDITION]), -1).argmax(axis=1)
        for row in classes:
            FAULTS.get(int(row), lambda: None)()
        if lost:
            raise RuntimeError("the device is lost")
        out = engine.run(rows)
        out[NEXT_LATENT][classes == NAN_CLASS] = np.nan
        return out

    return _Renamed(engine, run)


class _Renamed:
    """The engine, run differently."""

    def __init__(self, engine: EngineBackend, run: Callable[[Rows], dict[str, NDArray[Any]]]) -> None:
        self.name, self.inputs, self.outputs, self.close = engine.name, engine.inputs, engine.outputs, engine.close
        self.run = run


if __name__ == "__main__":
    main(load)
