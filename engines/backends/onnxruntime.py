"""ONNX Runtime on the CPU: float32, the reference the other backends are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import onnxruntime as ort
from numpy.typing import NDArray

from engines.backends.base import OfGraph, Precision, Rows
from engines.errors import BackendError
from engines.machine import limited_threads
from engines.manifest import GraphSpec


class OnnxRuntimeBackend(OfGraph):
    """One graph in an inference session.

    threads: worker threads of one run; 0 takes one per core.
    Raises: BackendError when the session cannot be made.
    """

    def __init__(self, file: Path, spec: GraphSpec, threads: int = 0) -> None:
        self._spec = spec
        self._outputs = [tensor.name for tensor in spec.outputs]
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or limited_threads()
        options.log_severity_level = 3
        try:
            self._session: Any = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exception types share no base but Exception
            raise BackendError(f"ONNX Runtime cannot load {file}: {error}") from error

    @property
    def name(self) -> str:
        return engine_name("int8" if self._spec.dtype == "int8" else "float32")

    def run(self, rows: Rows) -> dict[str, NDArray[Any]]:
        if self._session is None:
            raise BackendError("this ONNX Runtime engine was closed; load it again")
        try:
            arrays = self._session.run(self._outputs, dict(rows))
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed on {self._spec.file}: {error}") from error
        return dict(zip(self._outputs, arrays, strict=True))

    def close(self) -> None:
        self._session = None


def engine_name(precision: Precision | Literal["int8"]) -> str:
    """Backend, version and precision."""
    return f"onnxruntime {ort.__version__} {precision}"
