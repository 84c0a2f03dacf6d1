"""OpenVINO on the CPU: the fastest backend there, and the default."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from engines.backends.base import Rows
from engines.errors import BackendError
from engines.manifest import GraphSpec, TensorSpec


class OpenVinoBackend:
    """One compiled graph and one infer request.

    threads: worker threads of one run; 0 takes one per core. cache_dir: folder for compiled models, or None.
    Raises: BackendError when the graph cannot be compiled.
    """

    def __init__(self, file: Path, spec: GraphSpec, threads: int = 0, cache_dir: Path | None = None) -> None:
        self._spec = spec
        config: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
        }
        if cache_dir is not None:
            config["CACHE_DIR"] = str(cache_dir)
        try:
            compiled = _core().compile_model(file, "CPU", config)
            self._request: Any = compiled.create_infer_request()
        except Exception as error:  # its exception types share no base but Exception
            raise BackendError(f"OpenVINO cannot load {file}: {error}") from error

    @property
    def name(self) -> str:
        return f"openvino {version()} float32"

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.outputs

    def run(self, rows: Rows) -> dict[str, NDArray[Any]]:
        if self._request is None:
            raise BackendError("this OpenVINO engine was closed; load it again")
        try:
            inputs = {name: np.ascontiguousarray(array) for name, array in rows.items()}
            results = self._request.infer(inputs, share_inputs=True, share_outputs=False)
        except Exception as error:
            raise BackendError(f"OpenVINO failed on {self._spec.file}: {error}") from error
        return {tensor.name: results[tensor.name] for tensor in self._spec.outputs}

    def close(self) -> None:
        self._request = None


def version() -> str:
    """The installed release, such as ``2026.4.1``."""
    return str(ov.get_version()).partition("-")[0]


@cache
def _core() -> Any:
    """One core for all graphs: plugins and thread pools are per core."""
    return ov.Core()
