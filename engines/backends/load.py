"""Choosing a backend. Libraries are imported only when their backend is asked for."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

from engines.backends.base import EngineBackend, Precision
from engines.bundle import Bundle
from engines.cache import EngineKey
from engines.errors import BackendError
from engines.machine import machine_name

BackendName = Literal["auto", "openvino", "onnxruntime", "torch"]
PrecisionName = Literal["auto", "float32", "bfloat16"]

# Fastest first, as measured on CPUs: what ``auto`` tries.
BACKENDS: tuple[BackendName, ...] = ("openvino", "onnxruntime", "torch")
_INSTALL = {
    "openvino": "pip install halfstep",
    "onnxruntime": "pip install 'halfstep[onnxruntime]'",
    "torch": "pip install 'halfstep[torch]'",
}


def choose_backend(name: str) -> BackendName:
    """The backend a name stands for: itself, or for ``auto`` the fastest that is installed.

    Raises: BackendError when the name is unknown or nothing is installed.
    """
    for known in get_args(BackendName):
        if name == known != "auto":
            return known  # type: ignore[no-any-return]
    if name == "tensorrt":
        raise BackendError("TensorRT engines come in a later version; use --backend openvino.")
    if name != "auto":
        raise BackendError(f"There is no backend {name!r}; choose {', '.join(get_args(BackendName))}.")
    for backend in BACKENDS:
        if find_spec(backend) is not None:
            return backend
    raise BackendError(f"No backend is installed; install one with: {_INSTALL['openvino']}")


def choose_precision(backend: BackendName, precision: PrecisionName) -> Precision:
    """What a precision stands for on a backend; ``auto`` is float32.

    Measured on AVX512-BF16 without AMX: bfloat16 is no faster than float32 compiled per batch size.
    Raises: BackendError when the backend does not offer it.
    """
    if precision == "bfloat16" and backend != "openvino":
        raise BackendError(f"The {backend} backend runs float32 only; use --backend openvino for bfloat16.")
    return "float32" if precision == "auto" else precision


def load_backend(
    name: str,
    bundle: Bundle,
    graph: str,
    *,
    precision: PrecisionName = "auto",
    threads: int = 0,
    cache_dir: Path | None = None,
) -> EngineBackend:
    """One graph of a verified bundle, loaded and ready to run.

    name: openvino, onnxruntime, torch, or auto. precision: of the network body; auto is float32.
    threads: worker threads of one run, 0 for one per core. cache_dir: the engine cache, or None to
    keep nothing; it holds compiled models by ``engine_key``.
    Raises: BackendError when the library is missing, the graph cannot be loaded, or the precision is not offered.
    """
    backend = choose_backend(name)
    chosen = choose_precision(backend, precision)
    module = _import(backend)
    if cache_dir is not None:
        cache_dir = engine_key(bundle, graph, name, precision, threads).folder(cache_dir) / "models"
    file, spec = bundle.graph_file(graph), bundle.manifest.graphs[graph]
    if backend == "openvino":
        engine = module.OpenVinoBackend(file, spec, precision=chosen, threads=threads, cache_dir=cache_dir)
    elif backend == "onnxruntime":
        engine = module.OnnxRuntimeBackend(file, spec, threads)
    else:
        engine = module.TorchBackend(file, spec, threads)
    return engine  # type: ignore[no-any-return]


def engine_key(bundle: Bundle, graph: str, name: str, precision: PrecisionName, threads: int) -> EngineKey:
    """What an engine made with these arguments depends on. Raises: BackendError as ``load_backend`` does."""
    backend = choose_backend(name)
    engine = _import(backend).engine_name(choose_precision(backend, precision))
    return EngineKey(bundle.graph_sha256(graph), engine, machine_name(), threads)


def _import(backend: str) -> ModuleType:
    if find_spec(backend) is None:
        raise BackendError(f"The {backend} backend needs {backend}; install it with: {_INSTALL[backend]}")
    return importlib.import_module(f"engines.backends.{backend}")
