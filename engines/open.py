"""From a folder on disk to a warm pipeline, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engines.backends.base import EngineBackend
from engines.backends.load import Precision, choose_backend, load_backend
from engines.bundle import verify_bundle
from engines.pipeline import RUNGS, Pipeline


def open_pipeline(
    path: Path,
    backend: str = "auto",
    *,
    precision: Precision = "auto",
    threads: int = 0,
    cache_dir: Path | None = None,
    rungs: Sequence[int] = RUNGS,
    warm: bool = True,
) -> Pipeline:
    """Verify a bundle, load all its graphs on a backend, and run every rung once.

    threads: worker threads of one run, 0 for one per core. cache_dir: folder for compiled models, or None.
    rungs: batch sizes to be ready for; a batch is padded up to the next.
    Raises: BundleError, BackendError.
    """
    bundle = verify_bundle(path)
    chosen = choose_backend(backend)

    def load(graph: str) -> EngineBackend:
        return load_backend(chosen, bundle, graph, precision=precision, threads=threads, cache_dir=cache_dir)

    pipeline = Pipeline(bundle, load, rungs)
    if warm:
        pipeline.warm()
    return pipeline
