"""OpenVINO on the CPU: the fastest backend there, and the default.

float32: one model per batch and image size, each compiled for exactly those. Rows come out bit-equal whatever the
batch size or the companions, and a step takes about half the time of one model with a free batch size (group
normalisation fuses only when shapes are known). A graph too large to hold once per rung keeps its batch free, and
where it takes several image sizes, those too.

bfloat16: two models, the sinusoids of w and the timestep in float32, the rest in bfloat16 (see ``openvino_head``).
The plugin may choose kernels by batch size that round differently, so the rest is compiled per size only where that
is seen to give equal rows at every rung; else its batch stays free. On a CPU without bfloat16, an engine asked for
it is a float32 engine in all: compiled, named and kept in the cache as one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from engines.backends.base import RUNGS, OfGraph, Precision, Rows
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
    static: compile once per batch and image size; None decides by the weights, and in bfloat16 by ``examples`` too.
    sizes: how many image sizes it will be given. rungs: batch sizes to be ready for. examples: as many rows as the
    largest rung has, of each image size, to see in bfloat16 whether they come out the same at every rung.
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
        rungs: Sequence[int] = RUNGS,
        examples: Callable[[], Sequence[Rows]] = tuple,
    ) -> None:
        self._spec = spec
        self._precision = computed_in(precision)
        self._kept = None if cache_dir is None else SealedFolder(cache_dir)
        self._head: Any = None
        self._body: Any = None
        self._rungs: tuple[int, ...] = ()
        self._requests: dict[tuple[tuple[int, ...], ...], Any] = {}
        try:
            self._model: Any = _core().read_model(file)
            weights = _weight_bytes(self._model)
            fits = weights * sizes <= MAX_STATIC_BYTES
            self._config = _config(threads or int(weights < LONE_THREAD_BYTES) or limited_threads(), self._kept)
            if self._precision == "bfloat16" and (parts := split_head(self._model)):
                self._head, self._model = self._request(parts[0], "float32"), parts[1]
            self._static = fits if static is None else static
            if static is None and fits and self._precision == "bfloat16":
                self._static = self._keeps_rows(examples(), sorted(rungs))
            if not self._static:
                self._body = self._request(self._model, self._precision)
        except BackendError:
            raise
        except Exception as error:  # its exception types share no base but Exception
            raise BackendError(f"OpenVINO cannot load {file}: {error}") from error

    @property
    def name(self) -> str:
        return engine_name("int8" if self._spec.dtype == "int8" else self._precision)

    def run(self, rows: Rows) -> Arrays:
        if self._model is None:
            raise BackendError("this OpenVINO engine was closed; load it again")
        inputs = {tensor.name: np.ascontiguousarray(rows[tensor.name]) for tensor in self._spec.inputs}
        try:
            return self._at_rungs(inputs) if self._rungs else self._run(inputs)
        except BackendError:  # the cache's own words
            raise
        except Exception as error:
            raise BackendError(f"OpenVINO failed on {self._spec.file}: {error}") from error

    def close(self) -> None:
        self._model = self._head = self._body = None
        self._requests.clear()

    def _keeps_rows(self, examples: Sequence[Rows], rungs: Sequence[int]) -> bool:
        """Whether rows come out of models compiled per batch size as they do alone: at every rung and place in it.

        If so, those rungs are all that is ever run.
        """
        if not examples:
            return False
        for rows in examples:
            alone = [self._run(_taken(rows, [i])) for i in range(max(rungs))]
            for rung in rungs:
                for order in (range(rung), range(rung)[::-1]):
                    together = self._run(_taken(rows, order))
                    if any(not _same(together, k, alone[i]) for k, i in enumerate(order)):
                        _log.info("%s: in bfloat16 its rows differ at batch size %d", self._spec.file, rung)
                        self._requests.clear()
                        return False
        self._rungs = tuple(rungs)
        return True

    def _at_rungs(self, inputs: Arrays) -> Arrays:
        """In batches of the rungs alone, padded by the last row; more rows than the largest in several."""
        rows, parts, largest = len(next(iter(inputs.values()))), [], self._rungs[-1]
        if rows in self._rungs:
            return self._run(inputs)
        for first in range(0, rows, largest):
            here = min(largest, rows - first)
            rung = next(rung for rung in self._rungs if rung >= here)
            at = np.minimum(np.arange(first, first + rung), rows - 1)
            parts.append({name: array[:here] for name, array in self._run(_taken(inputs, at)).items()})
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _run(self, inputs: Arrays) -> Arrays:
        """No head in float32 and in graphs without sinusoids."""
        if self._head is not None:
            inputs = self._apply_head(inputs)
        return self._infer(self._request_for(inputs) if self._body is None else self._body, inputs)

    def _request_for(self, inputs: Arrays) -> Any:
        """The request compiled for exactly these shapes; the first of a size takes a compilation."""
        shapes = tuple(array.shape for array in inputs.values())
        if shapes not in self._requests:
            model = self._model.clone()
            model.reshape({name: list(array.shape) for name, array in inputs.items()})
            self._requests[shapes] = self._request(model, self._precision)
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
        needed = {name for port in self._model.inputs for name in port.get_names()}
        return {name: array for name, array in {**inputs, **extra}.items() if name in needed}

    def _infer(self, request: Any, inputs: Arrays) -> Arrays:
        results = request.infer(inputs, share_inputs=True, share_outputs=False)
        return {tensor.name: results[tensor.name] for tensor in self._spec.outputs}


def engine_name(precision: Precision | Literal["int8"]) -> str:
    """Backend, version and the precision that this CPU computes in where ``precision`` is asked for."""
    found = precision if precision == "int8" else computed_in(precision)
    return f"openvino {str(ov.get_version()).partition('-')[0]} {found}"


def _taken(rows: Rows, order: Any) -> Arrays:
    """The rows at ``order``, one after the other."""
    return {name: np.ascontiguousarray(array[np.asarray(order)]) for name, array in rows.items()}


def _same(outputs: Arrays, row: int, alone: Arrays) -> bool:
    """Whether a row of ``outputs`` is, to the bit, what ``alone`` has of one row."""
    return all(array[row].tobytes() == alone[name][0].tobytes() for name, array in outputs.items())


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
