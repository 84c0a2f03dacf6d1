"""Choosing a backend. Libraries are imported only when their backend is asked for."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

from engines.backends.base import RUNGS, EngineBackend, Precision
from engines.backends.cuda import find_device
from engines.backends.plan_store import PlanStore
from engines.bundle import Bundle
from engines.cache import EngineKey
from engines.errors import BackendError
from engines.machine import machine_name
from engines.manifest import GraphSpec, Size

BackendName = Literal["auto", "openvino", "onnxruntime", "torch", "tensorrt", "torch-cuda", "torch-inductor"]
PrecisionName = Literal["auto", "float32", "bfloat16", "float16"]

ON_GPU: frozenset[str] = frozenset({"tensorrt", "torch-cuda", "torch-inductor"})
OFFERED: dict[BackendName, tuple[Precision, ...]] = {
    "openvino": ("float32", "bfloat16"),
    "onnxruntime": ("float32",),
    "torch": ("float32",),
    "tensorrt": ("float32", "bfloat16", "float16"),
    "torch-cuda": ("float32", "bfloat16", "float16"),
    "torch-inductor": ("float32", "bfloat16", "float16"),
}
"""Precisions of the network body. Told float16, OpenVINO's CPU plugin computes the sampler's update in it, too."""

BUILT: frozenset[str] = frozenset({"openvino", "tensorrt", "torch-inductor"})
"""Backends that compile a graph for this machine, and keep what they made in the cache."""

_TORCH_CUDA = (
    "cuda_rows.py",
    "lowering.py",
    "torch.py",
    "torch_cuda.py",
    "torch_fused.py",
    "torch_operators.py",
)
BUILDERS: dict[str, tuple[str, ...]] = {
    "tensorrt": ("lowering.py", "tensorrt_build.py"),
    "torch-cuda": _TORCH_CUDA,
    "torch-inductor": (*_TORCH_CUDA, "torch_inductor.py"),
}
"""Our code that an engine is made of, by backend: what was built or measured with other code is not used."""

INT8: frozenset[str] = frozenset({"openvino", "onnxruntime"})
"""Backends that run int8 graphs."""

# Fastest first, as measured on CPUs: what ``auto`` tries. A GPU is used where it is asked for by name.
BACKENDS: tuple[BackendName, ...] = ("openvino", "onnxruntime", "torch")
_INSTALL = {
    "openvino": "pip install -e . (in the checkout)",
    "onnxruntime": "pip install -e '.[onnxruntime]' (in the checkout)",
    "torch": "pip install -e '.[torch]' (in the checkout)",
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
    for backend in BACKENDS:
        if find_spec(backend) is not None:
            return backend
    raise BackendError(f"No backend is installed; install one with: {_INSTALL['openvino']}")


def choose_precision(backend: BackendName, precision: PrecisionName) -> Precision:
    """What a precision stands for on a backend; ``auto`` is float32.

    Whether bfloat16 is faster there depends on the processor (decision 0002), and it is other bytes.
    Raises: BackendError when the backend does not offer it.
    """
    chosen: Precision = "float32" if precision == "auto" else precision
    if chosen not in OFFERED[backend]:
        own = " and ".join(OFFERED[backend])
        others = ", ".join(sorted(name for name, offered in OFFERED.items() if chosen in offered))
        raise BackendError(f"The {backend} backend runs {own} only; for {chosen} use --backend {others}.")
    return chosen


def graph_precision(spec: GraphSpec, precision: Precision) -> Precision:
    """What a graph computes in where ``precision`` is asked for.

    Where its export found that it overflows in float16, as SDXL's decoder does, that is bfloat16, whose range is
    float32's. Raises: BackendError when the export did not look.
    """
    if precision != "float16" or spec.dtype == "int8":
        return precision
    if "float16" not in spec.lowered:
        raise BackendError(
            f"The bundle does not say whether {spec.file} overflows in float16: export it again, or leave out "
            "--precision float16."
        )
    return "float16" if spec.lowered["float16"] is not None else "bfloat16"


def load_backend(
    name: str,
    bundle: Bundle,
    graph: str,
    *,
    precision: PrecisionName = "auto",
    threads: int = 0,
    cache_dir: Path | None = None,
    rungs: Sequence[int] = RUNGS,
) -> EngineBackend:
    """One graph of a verified bundle, loaded and ready to run.

    name: a BackendName. precision: of the network body, float32 for
    auto, and see ``graph_precision``. threads: CPU threads of one run, 0 for one per core. cache_dir: the engine
    cache, which holds compiled models by ``engine_key``, or None to keep nothing. rungs: batch sizes a GPU is made
    ready for.
    Raises: BackendError when the library or device is missing, the graph cannot be loaded, or the precision is not
    offered.
    """
    kept = None if cache_dir is None else (cache_dir, engine_key(bundle, graph, name, precision, threads))
    file, spec = bundle.graph_file(graph), bundle.manifest.graphs[graph]
    return load_graph(
        name,
        file,
        spec,
        precision=precision,
        threads=threads,
        kept=kept,
        rungs=rungs,
        sizes=bundle.manifest.sizes if spec.free else (),
    )


def load_graph(
    name: str,
    file: Path,
    spec: GraphSpec,
    *,
    precision: PrecisionName = "auto",
    threads: int = 0,
    kept: tuple[Path, EngineKey] | None = None,
    rungs: Sequence[int] = RUNGS,
    sizes: Sequence[Size] = (),
) -> EngineBackend:
    """One graph from its file, as ``load_backend``.

    kept: the engine cache and the graph's key in it. sizes: of images to be ready for, where the graph takes
    several.
    """
    backend = choose_backend(name)
    chosen = graph_precision(spec, choose_precision(backend, precision))
    module = _import(backend)
    if spec.dtype == "int8":
        _check_int8(backend, chosen)
    if backend == "openvino":
        models = None if kept is None else kept[1].folder(kept[0]) / "models"
        engine = module.OpenVinoBackend(
            file, spec, precision=chosen, threads=threads, cache_dir=models, sizes=max(1, len(sizes))
        )
    elif backend in ON_GPU and threads:
        raise BackendError(f"The {backend} backend has no CPU threads to set; leave threads at 0.")
    elif backend == "torch-cuda":
        engine = module.TorchCudaBackend(file, spec, precision=chosen, rungs=rungs, sizes=sizes)
    elif backend in ("tensorrt", "torch-inductor"):
        store = None if kept is None else PlanStore(*kept, sorted(rungs), [str(size) for size in sizes])
        made = module.TensorRtBackend if backend == "tensorrt" else module.TorchInductorBackend
        engine = made(file, spec, precision=chosen, rungs=rungs, sizes=sizes, store=store)
    elif backend == "onnxruntime":
        engine = module.OnnxRuntimeBackend(file, spec, threads)
    else:
        engine = module.TorchBackend(file, spec, threads)
    return engine  # type: ignore[no-any-return]


def engine_key(bundle: Bundle, graph: str, name: str, precision: PrecisionName, threads: int) -> EngineKey:
    """What an engine made with these arguments depends on. Raises: BackendError as ``load_backend`` does."""
    return key_of(bundle.graph_sha256(graph), bundle.manifest.graphs[graph], name, precision, threads)


def key_of(graph_sha256: str, spec: GraphSpec, name: str, precision: PrecisionName, threads: int = 0) -> EngineKey:
    """As ``engine_key``, of a graph by its hash."""
    backend = choose_backend(name)
    engine = _import(backend).engine_name(graph_precision(spec, choose_precision(backend, precision)))
    return EngineKey(graph_sha256, engine, machine_of(backend), threads, source=source_sha256(backend))


def machine_of(backend: BackendName) -> str:
    """What a backend's engines run on, as cache keys and benchmarks spell it. Raises: BackendError with no GPU."""
    return str(find_device()) if backend in ON_GPU else machine_name()


def _check_int8(backend: BackendName, precision: Precision) -> None:
    if backend not in INT8:
        choices = ", ".join(sorted(INT8))
        raise BackendError(
            f"The {backend} backend runs no int8 graphs; use --backend {choices}, or the float32 bundle."
        )
    if precision != "float32":
        raise BackendError(f"This bundle is int8, and the rest of it float32: leave out --precision {precision}.")


def _import(backend: str) -> ModuleType:
    if backend != "tensorrt" and find_spec(library := backend.partition("-")[0]) is None:
        raise BackendError(f"The {backend} backend needs {library}; install it with: {_INSTALL[library]}")
    return importlib.import_module(f"engines.backends.{backend.replace('-', '_')}")


def source_sha256(backend: str, folder: Path = Path(__file__).parent) -> str:
    """Hash of our code that decides what a graph becomes: flags, profiles, lowering, operators; empty of others.

    It is part of an engine's key, so that a release that changes any of it builds and measures anew. folder: of the
    code.
    """
    if backend not in BUILDERS:
        return ""
    digest = hashlib.sha256()
    for name in BUILDERS[backend]:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
