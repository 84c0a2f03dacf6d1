"""What stands around an engine and is one itself."""

from __future__ import annotations

from engines.backends.base import EngineBackend
from engines.manifest import TensorSpec


class EngineAround:
    """All is the engine's, but ``run``, which a subclass does in its own way."""

    def __init__(self, engine: EngineBackend) -> None:
        self._engine = engine

    @property
    def name(self) -> str:
        return self._engine.name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._engine.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._engine.outputs

    def release(self) -> bool:
        return self._engine.release()

    def close(self) -> None:
        self._engine.close()
