"""``python -m tests.chaos.node api|worker URL BUNDLE PORT PLANT``: a process to kill."""

from __future__ import annotations

import sys
from pathlib import Path

from server.engine_process import EngineProcess
from server.loading import build_service
from server.logs import configure_logs
from server.metrics import Metrics
from server.process import Process, bind, own_name
from server.settings import Settings
from server.stores.redis.store import ANSWER_S, PATIENT_ANSWER_S, RedisStore
from server.worker import Worker
from server.worker_process import WorkerProcess
from tests.chaos.plants import PLANTS

LEASE_S = 3.2
ENGINE = (sys.executable, "-m", "tests.chaos.engine")


def main(role: str, url: str, bundle: str, port: str, plant: str) -> None:
    configure_logs("warning")
    settings = Settings(
        bundles=(Path(bundle),), redis=url, lease_s=LEASE_S, cache_dir=None, hang_s=5.0, max_rows=24
    )
    answer_s = ANSWER_S if role == "api" else PATIENT_ANSWER_S
    store = RedisStore(url, settings.lease_s, settings.result_ttl_s, answer_s=answer_s)
    metrics = Metrics()
    if plant:
        PLANTS[plant](store)
    sock = bind("127.0.0.1", int(port))
    if role == "api":
        service = build_service(settings, store, metrics, None)
        Process(service, None, sock, lambda url: None).run_until_told()
        return
    engine = EngineProcess(settings, ENGINE)
    engine.spawn()
    worker = Worker(own_name(), engine, store, metrics, max_rows=settings.max_rows)
    WorkerProcess(settings, worker, store, metrics, sock, lambda url: None).run_until_told()


if __name__ == "__main__":
    main(*sys.argv[1:])
