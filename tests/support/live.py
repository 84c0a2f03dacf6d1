"""A process around fake engines, listening on a free loopback port, in a thread of the test's own."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any
from urllib.parse import urlsplit

import httpx

from engines.pipeline import Pipeline
from server.auth import Keyring
from server.engine_thread import EngineThread
from server.loading import open_safety
from server.process import Process, bind
from server.service import Service
from server.settings import Settings
from server.stores.base import JobStore
from server.worker import Worker
from tests.support.fake_engines import Bench
from tests.support.offline import offline_service


@dataclass(frozen=True)
class Live:
    """bench: holds its steps back on demand; service: what its routes share."""

    bench: Bench
    service: Service
    url: str

    def connect(self, timeout_s: float = 30.0) -> socket.socket:
        """A bare connection."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        return socket.create_connection((parts.hostname, parts.port or 80), timeout=timeout_s)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **options)

    def count(self, metric: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(metric, labels) or 0.0


@contextmanager
def live(
    bundle: Path,
    *,
    store: JobStore | None = None,
    make_engine: Callable[[Mapping[str, Pipeline]], EngineThread] = EngineThread,
    **settings: Any,
) -> Iterator[Live]:
    bench, ready = Bench(bundle), Queue[str]()
    chosen = Settings(**settings)
    keyring = None if chosen.api_keys is None else Keyring(chosen.api_keys)
    service = offline_service(bundle, chosen, keyring, store)
    engine = make_engine({"toy-digits": bench.pipeline})
    safety = open_safety(chosen, service.metrics)
    worker = Worker(
        "w",
        engine,
        service.store,
        service.metrics,
        max_rows=service.settings.max_rows,
        files=service.files,
        safety=safety,
    )
    process = Process(service, worker, bind("127.0.0.1", 0), ready.put)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(process.run_until_told)
        try:
            yield Live(bench, service, ready.get(timeout=60))
        finally:
            process.should_exit = True
            bench.allow()
            ended.result(timeout=60)
