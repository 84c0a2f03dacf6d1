"""Whether an engine that failed can still do what it could before: a lost device fails every call there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from engines.backends.base import EngineBackend, Rows
from server.engine_around import EngineAround


class CheckedEngine(EngineAround):
    """An engine that is tried on an example whenever a call fails.

    example: inputs it could run when it was loaded; broken: called with the reason when it no longer can.
    """

    def __init__(self, engine: EngineBackend, example: Rows, broken: Callable[[Exception], None]) -> None:
        super().__init__(engine)
        self._example = example
        self._broken = broken

    def run(self, rows: Rows) -> dict[str, NDArray[Any]]:
        try:
            return self._engine.run(rows)
        except Exception:  # whatever an engine raises; whose fault it was is the question
            self._check()
            raise

    def _check(self) -> None:
        try:
            self._engine.run(self._example)
        except Exception as error:  # as above
            self._broken(error)
