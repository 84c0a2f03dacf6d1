"""A worker by itself: jobs from the shared store, an engine process beside it, probes and metrics on a port."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import structlog
from fastapi import FastAPI

from server.api.operations import operations_routes
from server.metrics import Metrics
from server.process import DrainingServer
from server.renewal import Renew
from server.schemas import Readiness
from server.settings import Settings
from server.stores.base import JobStore, StoreUnavailableError
from server.worker import Worker

_log = structlog.get_logger()


class WorkerProcess(DrainingServer):
    """On a signal it claims nothing more, finishes what it holds, and gives back what it cannot finish in time."""

    def __init__(
        self,
        settings: Settings,
        worker: Worker,
        store: JobStore,
        metrics: Metrics,
        sock: socket.socket,
        ready: Callable[[str], None],
        renew: Renew | None = None,
    ) -> None:
        app = FastAPI(title="halfstep worker", docs_url=None, redoc_url=None, openapi_url=None)
        app.include_router(operations_routes(metrics, store, self._readiness))
        super().__init__(app, settings, metrics, sock, ready, renew)
        self._worker = worker
        self._store = store

    def run_until_told(self) -> str | None:
        """Work until a signal; one sentence on what went wrong, if anything did."""
        self.hear()
        if self._failed:
            return "The worker failed and the process ended; the log above says why."
        return None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._failed = False
        self._working = asyncio.create_task(self._worker.run(), name="worker")
        await super().startup(sockets)

    async def on_tick(self, counter: int) -> bool:
        if self._working.done() and not self._failed:
            self._failed = True
            _log.error("task_failed", task="worker", exc_info=self._working.exception())
            self.should_exit = True
        if self.draining:
            self._worker.drain()
            if self.late and not self._worker.idle:
                _log.warning("drain_timed_out", given_back=await self._worker.give_back_all())
            self.should_exit |= self.late or self._worker.idle
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self._working.cancel()
        await asyncio.wait([self._working])
        await self._store.close()

    async def _readiness(self) -> Readiness:
        if self.draining:
            return "draining"
        if not self._worker.engine_up:
            return "engine_down"
        try:
            await self._store.ping()
        except StoreUnavailableError:
            return "store_unavailable"
        return "ok"
