"""From a folder on disk to a warm pipeline that knows its costs, in one call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from engines.backends.base import RUNGS, EngineBackend
from engines.backends.load import PrecisionName, choose_backend, engine_key, load_backend
from engines.bundle import Bundle, verify_bundle
from engines.cache import EngineKey
from engines.calls import calls
from engines.cost import CostTable, load_costs, save_costs
from engines.errors import BackendError
from engines.measure import Progress, measure_costs
from engines.pipeline import Pipeline
from engines.warm import warm

_log = logging.getLogger(__name__)

QUICK_REPEATS = 3
"""Times that each call is timed where nothing was measured before; ``python -m engines build`` takes more."""


def open_pipeline(
    path: Path,
    backend: str = "auto",
    *,
    precision: PrecisionName = "auto",
    threads: int = 0,
    cache_dir: Path | None = None,
    rungs: Sequence[int] = RUNGS,
    warm: bool = True,
) -> Pipeline:
    """Verify a bundle, load all its graphs on a backend, and run every rung that is worth it (``know_costs``).

    threads: worker threads of one run, 0 for one per core. cache_dir: folder for compiled models and measured
    costs, or None to keep neither. rungs: batch sizes to be ready for; a batch is padded up to the next.
    warm: False leaves the first calls slow and ``Pipeline.costs`` None.
    Raises: BundleError, BackendError.
    """
    bundle = verify_bundle(path)
    pipeline = load_pipeline(
        bundle, backend, precision=precision, threads=threads, cache_dir=cache_dir, rungs=rungs
    )
    if warm:
        know_costs(pipeline, backend, precision, threads, cache_dir)
    return pipeline


def load_pipeline(
    bundle: Bundle,
    backend: str,
    *,
    precision: PrecisionName,
    threads: int,
    cache_dir: Path | None,
    rungs: Sequence[int],
) -> Pipeline:
    """All graphs of a verified bundle on one backend, cold; see ``open_pipeline``."""
    chosen = choose_backend(backend)

    def load(graph: str) -> EngineBackend:
        return load_backend(
            chosen, bundle, graph, precision=precision, threads=threads, cache_dir=cache_dir, rungs=rungs
        )

    return Pipeline(bundle, load, rungs)


def build_engines(
    path: Path,
    backend: str,
    *,
    precision: PrecisionName,
    threads: int,
    cache_dir: Path,
    rungs: Sequence[int] = RUNGS,
) -> None:
    """Compile every graph of a bundle into the cache for the rungs that are worth it, and keep no costs.

    What a call takes beside others' work is good for no more than to tell a long one.

    Raises: BundleError, BackendError.
    """
    with closing(
        load_pipeline(
            verify_bundle(path), backend, precision=precision, threads=threads, cache_dir=cache_dir, rungs=rungs
        )
    ) as pipeline:
        measure_costs(pipeline, repeats=1)


def know_costs(
    pipeline: Pipeline,
    backend: str,
    precision: PrecisionName,
    threads: int,
    cache_dir: Path | None,
    *,
    repeats: int = QUICK_REPEATS,
    again: bool = False,
    progress: Progress | None = None,
) -> None:
    """Warm a pipeline and give it its cost table: the kept one, or a fresh measurement that is then kept.

    again: measure even where a table is kept, to keep this one. Raises: BackendError where it then cannot be kept.
    """
    bundle = pipeline.bundle
    kept = None if again else kept_costs(bundle, backend, precision, threads, cache_dir, pipeline.rungs)
    if kept is not None:
        pipeline.costs = kept
        warm(pipeline)
        return
    costs = measure_costs(pipeline, repeats, progress)
    if cache_dir is None:
        return
    try:
        save_costs(costs, _keys(bundle, backend, precision, threads), cache_dir, repeats, _steps(bundle))
    except BackendError as error:
        if again:
            raise
        _log.warning("%s; measured again at the next start", error)


def kept_costs(
    bundle: Bundle,
    backend: str,
    precision: PrecisionName,
    threads: int,
    cache_dir: Path | None,
    rungs: Sequence[int] = RUNGS,
) -> CostTable | None:
    """The table an engine with these arguments has in the cache, without loading it; None where it has none."""
    if cache_dir is None:
        return None
    return load_costs(_keys(bundle, backend, precision, threads), rungs, cache_dir, _steps(bundle))


def _steps(bundle: Bundle) -> set[str]:
    """The calls that take a step: a bundle's own, where other graphs may be those of others, too."""
    own = {student.graph for student in (*bundle.manifest.students, *bundle.manifest.encoders)}
    return {str(call) for call in calls(bundle.manifest) if call.graph in own}


def _keys(bundle: Bundle, backend: str, precision: PrecisionName, threads: int) -> dict[str, EngineKey]:
    """By call, what its costs depend on."""
    return {
        str(call): replace(
            engine_key(bundle, call.graph, backend, precision, threads), size=str(call.size) if call.free else ""
        )
        for call in calls(bundle.manifest)
    }
