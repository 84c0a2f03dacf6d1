"""The three ways to run: all in one process, the API alone, a worker alone. Each runs until it is told to end."""

from __future__ import annotations

import asyncio

from rich.console import Console

from server.engine import Engine
from server.engine_thread import EngineThread
from server.errors import StartError
from server.loading import (
    build_service,
    build_store,
    load_pipelines,
    open_files,
    open_safety,
    spare_the_collector,
)
from server.metrics import Metrics
from server.process import Process, bind, check_exposure, own_name, url_of
from server.safety import Safety
from server.settings import CLIENT_KEY, Settings
from server.storage import ResultStore, is_folder
from server.stores.base import JobStore
from server.succession import Succession, make_engine, start_settings
from server.versions import Version, hashes, new_versions, offer, read_versions
from server.worker import Worker
from server.worker_process import WorkerProcess

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


def serve(settings: Settings) -> str | None:
    """API and worker in one process; what went wrong after the start, if anything did."""
    settings = settings.model_copy(update={"redis": "", "metrics_port": None})  # which are of api and worker
    check_exposure(settings)
    sock = bind(settings.host, settings.port)
    store, metrics = build_store(settings), Metrics()
    safety, files = open_safety(settings, metrics), open_files(settings, metrics)
    engine = _open_engine(settings, metrics, isolated=settings.isolate_engine)
    bundles = [version.bundle for version in engine.versions]
    service = build_service(settings, store, metrics, files, bundles)
    metrics.offers(bundles)
    service.costs.update({own_name(): engine.offers})
    service.engine_up = lambda: engine.up
    metrics.watch_engine(lambda: engine.pid, lambda: engine.up)
    metrics.is_a("serve")
    worker = _worker(settings, engine, store, metrics, files, safety)
    prompt = service.catalogue.default.tokenizer.known()[0]

    async def renew() -> None:
        offer(await engine.renew(), service)

    def ready(url: str) -> None:
        spare_the_collector()
        _announce(url, _names(engine), prompt, keys=settings.api_keys is not None)

    return Process(service, worker, sock, ready, renew=renew).run_until_told()


def api(settings: Settings) -> str | None:
    """The API alone; what went wrong after the start, if anything did."""
    _need_redis(settings)
    _need_secret(settings)
    check_exposure(settings)
    sock = bind(settings.host, settings.port)
    metrics_sock = None
    if settings.metrics_port is not None:
        metrics_sock = bind(settings.host, settings.metrics_port, "--metrics-port")
    metrics, versions = Metrics(), read_versions(settings)
    bundles = [version.bundle for version in versions]
    service = build_service(settings, build_store(settings), metrics, open_files(settings, metrics), bundles)
    metrics.is_a("api")
    metrics.offers(bundles)
    names = ", ".join(model.name for model in service.catalogue)
    prompt = service.catalogue.default.tokenizer.known()[0]

    def ready(url: str) -> None:
        spare_the_collector()
        if metrics_sock is not None:
            _out.print(f"Metrics     {url_of(metrics_sock)}/metrics", markup=False)
        _announce(url, names, prompt, keys=settings.api_keys is not None)

    async def renew() -> None:
        nonlocal versions
        versions = await asyncio.to_thread(new_versions, settings, versions)
        offer(versions, service)

    return Process(service, None, sock, ready, metrics_sock, renew=renew).run_until_told()


def worker(settings: Settings) -> str | None:
    """A worker alone; what went wrong after the start, if anything did."""
    _need_redis(settings)
    sock = bind(settings.host, settings.metrics_port or 0, "--metrics-port")
    store, metrics = build_store(settings, patient=True), Metrics()
    safety, files = open_safety(settings, metrics), open_files(settings, metrics)
    engine = _open_engine(settings, metrics, isolated=True)
    metrics.is_a("worker")
    metrics.watch_engine(lambda: engine.pid, lambda: engine.up)

    def ready(url: str) -> None:
        spare_the_collector()
        _out.print(f"Working on {_names(engine)}\nMetrics     {url}/metrics", markup=False)

    async def renew() -> None:
        await engine.renew()

    process = WorkerProcess(
        settings,
        _worker(settings, engine, store, metrics, files, safety),
        store,
        metrics,
        sock,
        ready,
        renew,
    )
    return process.run_until_told()


def _open_engine(settings: Settings, metrics: Metrics, *, isolated: bool) -> Succession:
    """The engine to start on, ready, with what comes after it; in a process of its own where it is to change."""
    with _err.status("Loading and warming the models"):
        if not isolated and settings.start_backend is None:
            pipelines = load_pipelines(settings)
            versions = tuple(Version(pipeline.bundle, pipeline.tokenizer) for pipeline in pipelines.values())
            return Succession(EngineThread(pipelines), settings, versions, metrics)
        versions = read_versions(settings)
        engine = make_engine(start_settings(settings, versions), hashes(versions))
        engine.spawn()
        return Succession(engine, settings, versions, metrics)


def _worker(
    settings: Settings,
    engine: Engine,
    store: JobStore,
    metrics: Metrics,
    files: ResultStore | None,
    safety: Safety | None,
) -> Worker:
    return Worker(
        own_name(),
        engine,
        store,
        metrics,
        max_rows=settings.max_rows,
        lease_s=settings.lease_s,
        encode_threads=settings.encode_threads,
        files=files,
        safety=safety,
    )


def _need_redis(settings: Settings) -> None:
    if not settings.redis:
        raise StartError("Name the job store that API and workers share with --redis URL (HALFSTEP_REDIS).")


def _need_secret(settings: Settings) -> None:
    """Every API has to know the addresses that another one signed."""
    if settings.result_store and is_folder(settings.result_store) and not settings.secret.get_secret_value():
        raise StartError(
            "Addresses of files are signed: set HALFSTEP_SECRET to the same value for every API process that shares"
            " the folder of HALFSTEP_RESULT_STORE; `openssl rand -hex 32` gives one."
        )


def _names(engine: Engine) -> str:
    return ", ".join(f"{name} on {offer.engine}" for name, offer in engine.offers.items())


def _announce(url: str, names: str, prompt: str, *, keys: bool) -> None:
    _out.print(f"Serving {names}", markup=False)
    _out.print(f"Playground  {url}/\nReference   {url}/docs\nTry it:", markup=False)
    key = f'-H "Authorization: Bearer ${CLIENT_KEY}" ' if keys else ""
    body = f"{key}-H 'Content-Type: application/json' -d '{{\"prompt\": \"{prompt}\"}}'"
    _out.print(
        f"  curl -s {url}/v1/images/generations {body}"
        " | python3 -c 'import base64, json, sys;"
        ' open("image.png", "wb").write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))\'',
        markup=False,
    )
