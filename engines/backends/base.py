"""The protocol every backend fulfils."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from engines.manifest import GraphSpec, TensorSpec

Rows = Mapping[str, NDArray[Any]]
Precision = Literal["float32", "bfloat16", "float16"]

RUNGS = (1, 2, 4, 8, 16, 32)
"""Batch sizes to be ready for, unless told otherwise."""


class EngineBackend(Protocol):
    """One loaded graph.

    ``run`` takes all inputs with one common batch size and returns all outputs with the same. The returned
    arrays belong to the caller: a later ``run`` does not overwrite them. Inputs may be reused at once after
    ``run`` returns. Not thread-safe: one thread runs an engine at a time.
    """

    @property
    def name(self) -> str:
        """Backend, version and precision, as responses report it: ``openvino 2026.4.1 float32``."""
        ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def run(self, rows: Rows) -> dict[str, NDArray[Any]]:
        """Raises: OutOfMemoryError when the device has no room for the rows; BackendError when the engine fails."""
        ...

    def release(self) -> bool:
        """Give back the memory that calls hold until the next; the next of each batch size is slow again.

        False where there is none to give back.
        """
        ...

    def close(self) -> None:
        """Free the engine. Idempotent."""
        ...


class OfGraph:
    """What every backend of one graph says of it: its tensors, as the manifest names them."""

    _spec: GraphSpec

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.outputs

    def release(self) -> bool:
        """Nothing is held, unless a backend says otherwise."""
        return False
