"""From settings to loaded models and the service in front of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import structlog

from engines.errors import BundleError
from engines.open import open_pipeline
from engines.pipeline import Pipeline
from server.admission import Admission
from server.catalogue import Catalogue, Model
from server.costs import predicted_s
from server.metrics import Metrics
from server.service import Service
from server.settings import DEFAULT_BUNDLE, Settings
from server.stores.memory import MemoryStore

_log = structlog.get_logger()


def usable_cache(folder: Path | None) -> Path | None:
    """The folder, made and with ``~`` expanded, or None where nothing can be kept in it."""
    if folder is None:
        return None
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:  # the latter: this user has no home
        _log.warning("cache_not_writable", folder=str(folder), error=str(error))
        return None


def load_pipelines(settings: Settings) -> dict[str, Pipeline]:
    """Verified, loaded and warm, by model name. Raises: BundleError, BackendError."""
    pipelines: dict[str, Pipeline] = {}
    cache_dir = usable_cache(settings.cache_dir)
    for path in settings.bundles:
        if path == DEFAULT_BUNDLE and not path.exists():
            raise BundleError(f"There is no default bundle at {path}; name one with --bundle FOLDER.")
        pipeline = open_pipeline(
            path,
            settings.backend,
            precision=settings.precision,
            threads=settings.threads,
            cache_dir=cache_dir,
        )
        name = pipeline.manifest.name
        if name in pipelines:
            raise BundleError(f"Two bundles are named {name}; serve one of them, or rename the other.")
        pipelines[name] = pipeline
    return pipelines


def build_service(settings: Settings, pipelines: Mapping[str, Pipeline]) -> Service:
    """The API's side of a process whose worker runs these pipelines."""
    metrics = Metrics()
    metrics.watch_memory(os.getpid())
    for pipeline in pipelines.values():
        metrics.serves(pipeline.manifest, pipeline.engine_name)
    catalogue = Catalogue(
        Model.of(pipeline.bundle, partial(predicted_s, pipeline)) for pipeline in pipelines.values()
    )
    return Service(
        settings=settings,
        catalogue=catalogue,
        store=MemoryStore(settings.lease_s, settings.result_ttl_s),
        admission=Admission(catalogue, settings.max_queue_s, settings.max_queued_rows),
        metrics=metrics,
    )
