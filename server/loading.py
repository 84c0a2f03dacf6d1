"""From settings to loaded models and the service in front of them."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import structlog

from engines.bundle import Bundle, verify_bundle
from engines.cache import open_cache
from engines.errors import BackendError, BundleError
from engines.open import open_pipeline
from engines.pipeline import Pipeline
from engines.signing import check_signature
from server.admission import Admission
from server.auth import Keyring
from server.catalogue import Catalogue, Model
from server.costs import CostBook, Offer
from server.errors import StartError
from server.metrics import Metrics
from server.rates import Rates
from server.safety import Safety, load_check
from server.service import Service
from server.settings import DEFAULT_BUNDLE, Settings
from server.storage import ResultStore
from server.stores.base import JobStore
from server.stores.memory import MemoryStore

_log = structlog.get_logger()


def usable_cache(folder: Path | None) -> Path | None:
    """The folder, made and with ``~`` expanded, or None where nothing can be kept in it."""
    if folder is None:
        return None
    try:
        return open_cache(folder)
    except BackendError as error:
        _log.warning("cache_not_writable", folder=str(folder), error=str(error))
        return None


def load_pipelines(settings: Settings, known: Mapping[str, Offer] | None = None) -> dict[str, Pipeline]:
    """Verified and loaded, by model name; warmed and measured unless that is known already.

    Raises: BundleError, BackendError.
    """
    pipelines: dict[str, Pipeline] = {}
    cache_dir = usable_cache(settings.cache_dir)
    for path in settings.bundles:
        pipeline = open_pipeline(
            trusted(path, settings),
            settings.backend,
            precision=settings.precision,
            threads=settings.threads,
            cache_dir=cache_dir,
            rungs=settings.rungs,
            warm=not known,
        )
        name = pipeline.manifest.name
        if known and name in known:
            pipeline.costs = known[name].costs
        _check_names([*pipelines, name])
        pipelines[name] = pipeline
    return pipelines


def build_store(settings: Settings, *, patient: bool = False) -> JobStore:
    """The store of this process alone, or the shared one where ``redis`` is set.

    patient: give it more time to answer, as no client waits here. Raises: StartError.
    """
    if not settings.redis:
        return MemoryStore(settings.lease_s, settings.result_ttl_s)
    from server.stores.redis.connections import ANSWER_S, PATIENT_ANSWER_S  # noqa: PLC0415 - only where used
    from server.stores.redis.store import RedisStore  # noqa: PLC0415

    answer_s = PATIENT_ANSWER_S if patient else ANSWER_S
    try:
        return RedisStore(settings.redis, settings.lease_s, settings.result_ttl_s, answer_s=answer_s)
    except ValueError as error:
        raise StartError(f"The setting redis (HALFSTEP_REDIS) is no URL of a Redis: {error}") from None


def open_files(settings: Settings, metrics: Metrics) -> ResultStore | None:
    """Where results go whose addresses are asked for, if anywhere. Raises: StartError."""
    if not settings.result_store:
        return None
    return ResultStore.open(settings.result_store, settings.result_ttl_s, metrics)


def open_safety(settings: Settings, metrics: Metrics) -> Safety | None:
    """The check of finished images, if there is one. Raises: StartError."""
    if not settings.safety_check:
        return None
    check = load_check(settings.safety_check)
    return Safety(check, settings.safety_timeout_s, settings.encode_threads, metrics)


def served_bundles(settings: Settings) -> tuple[Bundle, ...]:
    """What is to be served, as it lies there now: links are followed once, so each keeps its folder.

    Raises: BundleError.
    """
    bundles = tuple(verify_bundle(trusted(path.resolve(), settings)) for path in settings.bundles)
    _check_names([bundle.manifest.name for bundle in bundles])
    return bundles


def models_of(bundles: Sequence[Bundle], costs: CostBook) -> list[Model]:
    return [Model.of(bundle, partial(costs.predicted_s, bundle.manifest)) for bundle in bundles]


def build_service(
    settings: Settings,
    store: JobStore,
    metrics: Metrics,
    files: ResultStore | None,
    bundles: Sequence[Bundle] | None = None,
) -> Service:
    """The API's side: it knows the bundles, and from the workers what their work costs.

    bundles: what is served, where it was read already. Raises: BundleError.
    """
    costs = CostBook()
    catalogue = Catalogue(models_of(served_bundles(settings) if bundles is None else bundles, costs))
    return Service(
        settings=settings,
        catalogue=catalogue,
        store=store,
        admission=Admission(catalogue, settings.max_queue_s, settings.max_queued_rows, settings.tenant_share),
        metrics=metrics,
        costs=costs,
        keyring=None if settings.api_keys is None else Keyring(settings.api_keys),
        rates=Rates(settings.redis if store.outlives_process else None),
        files=files,
    )


def spare_the_collector() -> None:
    """Let the garbage collector leave alone what is loaded, and lives as long as the process.

    It would walk all of that every few hundred requests, while everybody waits (docs/decisions, HTTP and worker).
    """
    gc.collect()
    gc.freeze()


def trusted(path: Path, settings: Settings) -> Path:
    """The folder, if it is there and, where signatures are demanded, signed by the right key."""
    if path.resolve() == DEFAULT_BUNDLE.resolve() and not path.exists():
        raise BundleError(f"There is no default bundle at {path}; name one with --bundle FOLDER.")
    if settings.bundle_key is not None:
        check_signature(path, settings.bundle_key)
    return path


def _check_names(names: Sequence[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BundleError(f"Two bundles are named {twice}; serve one of them, or rename the other.")
