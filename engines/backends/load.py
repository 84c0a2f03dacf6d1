"""Choosing a backend. Libraries are imported only when their backend is asked for."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

from engines.backends.base import EngineBackend
from engines.bundle import Bundle
from engines.errors import BackendError

BackendName = Literal["auto", "openvino", "onnxruntime", "torch"]
Precision = Literal["auto", "float32", "bfloat16"]

# Fastest first, as measured on CPUs: what ``auto`` tries.
_PREFERENCE: tuple[BackendName, ...] = ("openvino", "onnxruntime", "torch")
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
    if name != "auto":
        raise BackendError(f"There is no backend {name!r}; choose {', '.join(get_args(BackendName))}.")
    for backend in _PREFERENCE:
        if find_spec(backend) is not None:
            return backend
    raise BackendError(f"No backend is installed; install one with: {_INSTALL['openvino']}")


def load_backend(
    name: str,
    bundle: Bundle,
    graph: str,
    *,
    precision: Precision = "auto",
    threads: int = 0,
    cache_dir: Path | None = None,
) -> EngineBackend:
    """One graph of a verified bundle, loaded and ready to run.

    name: openvino, onnxruntime, torch, or auto. precision: of the network body; auto lets the backend choose.
    threads: worker threads of one run, 0 for one per core. cache_dir: folder for compiled models, or None.
    Raises: BackendError when the library is missing, the graph cannot be loaded, or the precision is not offered.
    """
    backend = choose_backend(name)
    module = _import(backend)
    file, spec = bundle.graph_file(graph), bundle.manifest.graphs[graph]
    if backend == "openvino":
        return module.OpenVinoBackend(file, spec, threads, cache_dir)  # type: ignore[no-any-return]
    if precision == "bfloat16":
        raise BackendError(f"The {backend} backend runs float32 only; use --backend openvino for bfloat16.")
    return module.OnnxRuntimeBackend(file, spec, threads)  # type: ignore[no-any-return]


def _import(backend: str) -> ModuleType:
    if find_spec(backend) is None:
        raise BackendError(f"The {backend} backend needs {backend}; install it with: {_INSTALL[backend]}")
    return importlib.import_module(f"engines.backends.{backend}")
