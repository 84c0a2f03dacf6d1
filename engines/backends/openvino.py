"""OpenVINO on the CPU: the fastest backend there, and the default.

float32: one model per batch and image size, each compiled for exactly those. Rows come out bit-equal whatever the
batch size or the companions, and a step takes about half the time of one model with a free batch size (group
normalisation fuses only when shapes are known). A graph too large to hold once per rung keeps its batch free, and
where it takes several image sizes, those too.

bfloat16: likewise, because models compiled per size are not bit-equal in bfloat16, and two models: the
sinusoids of w and the timestep in float32, the rest in bfloat16 (see ``openvino_head``). On a CPU without it, an
engine asked for bfloat16 is a float32 engine in all: compiled, named and kept in the cache as one.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from engines.backends.base import OfGraph, Precision, Rows
from engines.backends.openvino_head import head_input, split_head
from engines.backends.sealed_folder import SealedFolder
from engines.errors import BackendError
from engines.machine import limited_threads
from engines.manifest import GraphSpec

_log = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]

MAX_STATIC_BYTES = 128 * 1024 * 1024
"""Most weights of a graph that is compiled once per batch size, times its image sizes; each copy takes about twice
its size in memory."""

LONE_THREAD_BYTES = 1024 * 1024
"""A graph with less weights than this runs on the calling thread: waking others costs more than they save."""

_HINTS: dict[Precision, str] = {"float32": "f32", "bfloat16": "bf16"}


class OpenVinoBackend(OfGraph):
    """One graph, compiled.

    precision: of the network body, as far as this CPU has it (``computed_in``). threads: worker threads of one run;
    0 takes one per core, or one alone for a tiny graph. cache_dir: folder where compiled models are kept, or None.
    static: compile once per batch and image size; None decides by the weights. sizes: how many image sizes it will
    be given.
    Raises: BackendError when the graph cannot be compiled.
    """

    def __init__(
        self,
        file: Path,
        spec: GraphSpec,
        *,
        precision: Precision = "float32",
        threads: int = 0,
        cache_dir: Path | None = None,
        static: bool | None = None,
        sizes: int = 1,
    ) -> None:
        self._spec = spec
        self._precision = computed_in(precision)
        self._kept = None if cache_dir is None else SealedFolder(cache_dir)
        self._head: Any = None
        self._body: Any = None
        try:
            self._model: Any = _core().read_model(file)
            weights = _weight_bytes(self._model)
            fits = self._precision == "float32" and weights * sizes <= MAX_STATIC_BYTES
            self._static = fits if static is None else static
            self._config = _config(threads or int(weights < LONE_THREAD_BYTES) or limited_threads(), self._kept)
            if not self._static:
                self._compile_dynamic()
        except BackendError:
            raise
        except Exception as error:  # its exception types share no base but Exception
            raise BackendError(f"OpenVINO cannot load {file}: {error}") from error
        self._requests: dict[tuple[tuple[int, ...], ...], Any] = {}

    @property
    def name(self) -> str:
        return engine_name("int8" if self._spec.dtype == "int8" else self._precision)

    def run(self, rows: Rows) -> Arrays:
        if self._model is None:
            raise BackendError("this OpenVINO engine was closed; load it again")
        inputs = {tensor.name: np.ascontiguousarray(rows[tensor.name]) for tensor in self._spec.inputs}
        try:
            if self._static:
                return self._infer(self._request_for(inputs), inputs)
            if self._head is not None:
                inputs = self._apply_head(inputs)
            return self._infer(self._body, inputs)
        except BackendError:  # the cache's own words
            raise
        except Exception as error:
            raise BackendError(f"OpenVINO failed on {self._spec.file}: {error}") from error

    def close(self) -> None:
        self._model = self._head = self._body = None
        self._requests.clear()

    def _compile_dynamic(self) -> None:
        """Make the requests of free shapes; no head in float32 and in graphs without sinusoids."""
        body = self._model
        if self._precision == "bfloat16" and (parts := split_head(self._model)):
            self._head, body = self._request(parts[0], "float32"), parts[1]
        self._body = self._request(body, self._precision)

    def _request_for(self, inputs: Arrays) -> Any:
        """The request compiled for exactly these shapes; the first of a size takes a compilation."""
        shapes = tuple(array.shape for array in inputs.values())
        if shapes not in self._requests:
            self._model.reshape({name: list(array.shape) for name, array in inputs.items()})
            self._requests[shapes] = self._request(self._model, self._precision)
        return self._requests[shapes]

    def _request(self, model: Any, precision: Precision) -> Any:
        config = {**self._config, "INFERENCE_PRECISION_HINT": _HINTS[precision]}
        with nullcontext() if self._kept is None else self._kept.in_use():
            compiled = _core().compile_model(model, "CPU", config)
        if self._kept is not None and not (self._kept.wrote or compiled.get_property("LOADED_FROM_CACHE")):
            _log.warning(  # OpenVINO drops what it cannot write without a word
                "%s is compiled, but not kept in %s: make room there, or choose another cache",
                self._spec.file,
                self._kept.path,
            )
        return compiled.create_infer_request()

    def _apply_head(self, inputs: Arrays) -> Arrays:
        wanted = {name for port in self._head.model_inputs for name in port.get_names()}
        results = self._head.infer({k: v for k, v in inputs.items() if k in wanted}, share_inputs=True)
        extra = {head_input(i): results[i] for i in range(len(results))}
        needed = {name for port in self._body.model_inputs for name in port.get_names()}
        return {name: array for name, array in {**inputs, **extra}.items() if name in needed}

    def _infer(self, request: Any, inputs: Arrays) -> Arrays:
        results = request.infer(inputs, share_inputs=True, share_outputs=False)
        return {tensor.name: results[tensor.name] for tensor in self._spec.outputs}


def engine_name(precision: Precision | Literal["int8"]) -> str:
    """Backend, version and the precision that this CPU computes in where ``precision`` is asked for."""
    found = precision if precision == "int8" else computed_in(precision)
    return f"openvino {str(ov.get_version()).partition('-')[0]} {found}"


def _weight_bytes(model: Any) -> int:
    """In float32: weights kept in float16 are cast when the model is compiled."""
    constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
    return sum(op.get_byte_size() * (2 if op.get_element_type() == ov.Type.f16 else 1) for op in constants)


def _config(threads: int, kept: SealedFolder | None) -> dict[str, Any]:
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
    if kept is not None:
        config["CACHE_DIR"] = str(kept.path)
    return config


def computed_in(precision: Precision) -> Precision:
    """What this CPU computes in where ``precision`` is asked for: float32 in place of a bfloat16 that it lacks.

    That is logged once.
    """
    if precision != "bfloat16" or has_bfloat16():
        return precision
    _tell_without_bfloat16()
    return "float32"


def has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16; on others the plugin takes float32 instead and says nothing."""
    return bool("BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


@cache
def _tell_without_bfloat16() -> None:
    """Once a process."""
    _log.warning("this CPU has no bfloat16: OpenVINO computes in float32 instead, and its engines are named so")


@cache
def _core() -> Any:
    """One core for all graphs: it holds the plugin."""
    return ov.Core()
