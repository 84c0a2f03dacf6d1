"""``python -m tests.chaos.node serve|api|worker URL BUNDLE PORT PLANT``: a process to kill, or to load."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from server.engine_process import EngineProcess
from server.loading import build_service, build_store
from server.logs import configure_logs
from server.metrics import Metrics
from server.process import Process, bind, own_name
from server.settings import Settings
from server.stores.redis.connections import ANSWER_S, PATIENT_ANSWER_S
from server.stores.redis.store import RedisStore
from server.worker import Worker
from server.worker_process import WorkerProcess
from tests.chaos.plants import PLANTS

LEASE_S = 3.2
RESULT_TTL_S = 3600.0
"""Longer than any run: what was promised is read again at its end."""
ROWS = 24
ENGINE = (sys.executable, "-m", "tests.chaos.engine")


def main(role: str, url: str, bundle: str, port: str, plant: str) -> None:
    configure_logs("warning")
    rows = Settings().max_rows if "HALFSTEP_MAX_ROWS" in os.environ else ROWS
    settings = Settings(
        bundles=(Path(bundle),),
        redis=url,
        lease_s=LEASE_S,
        result_ttl_s=RESULT_TTL_S,
        hang_s=5.0,
        max_rows=rows,
    )
    if role == "serve":
        serve(settings, int(port))
        return
    answer_s = ANSWER_S if role == "api" else PATIENT_ANSWER_S
    store = RedisStore(url, settings.lease_s, settings.result_ttl_s, answer_s=answer_s)
    metrics = Metrics()
    if plant:
        PLANTS[plant].put(store)
    sock = bind("127.0.0.1", int(port))
    if role == "api":
        service = build_service(settings, store, metrics, None)
        Process(service, None, sock, lambda url: None).run_until_told()
        return
    worker = Worker(own_name(), open_engine(settings), store, metrics, max_rows=settings.max_rows, lease_s=LEASE_S)
    WorkerProcess(settings, worker, store, metrics, sock, lambda url: None).run_until_told()


def serve(settings: Settings, port: int) -> None:
    """API and worker in one process, as ``python -m server serve``."""
    sock, metrics = bind("127.0.0.1", port), Metrics()
    store = build_store(settings)
    engine = open_engine(settings)
    worker = Worker(own_name(), engine, store, metrics, max_rows=settings.max_rows, lease_s=LEASE_S)
    service = build_service(settings, store, metrics, files=None)
    service.costs.update({own_name(): engine.offers})
    Process(service, worker, sock, lambda url: None).run_until_told()


def open_engine(settings: Settings) -> EngineProcess:
    engine = EngineProcess(settings, ENGINE)
    engine.spawn()
    return engine


if __name__ == "__main__":
    main(*sys.argv[1:])
