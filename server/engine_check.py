"""Whether an engine that failed can still do what it could before: a lost device fails every call there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from engines.backends.base import EngineBackend, Rows
from engines.manifest import TensorSpec


class CheckedEngine:
    """An engine that is tried on an example whenever a call fails.

    example: inputs it could run when it was loaded; broken: called with the reason when it no longer can.
    """

    def __init__(self, engine: EngineBackend, example: Rows, broken: Callable[[Exception], None]) -> None:
        self._engine = engine
        self._example = example
        self._broken = broken

    @property
    def name(self) -> str:
        return self._engine.name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._engine.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._engine.outputs

    def run(self, rows: Rows) -> dict[str, NDArray[Any]]:
        try:
            return self._engine.run(rows)
        except Exception:  # whatever an engine raises; whose fault it was is the question
            self._check()
            raise

    def close(self) -> None:
        self._engine.close()

    def _check(self) -> None:
        try:
            self._engine.run(self._example)
        except Exception as error:  # as above
            self._broken(error)
