"""Probes and metrics of an API on a port of their own: Prometheus needs no way to the port of the clients."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn
from fastapi import FastAPI

from server.api.operations import operations_routes
from server.service import Service


class MetricsPort(uvicorn.Server):
    """Serves beside the API in the same event loop. Signals belong to the API."""

    def __init__(self, service: Service, sock: socket.socket) -> None:
        app = FastAPI(title="halfstep metrics", docs_url=None, redoc_url=None, openapi_url=None)
        app.include_router(operations_routes(service.metrics, service.store, service.readiness))
        super().__init__(
            uvicorn.Config(app, lifespan="off", ws="none", log_config=None, access_log=False, server_header=False)
        )
        self.sock = sock

    def open(self) -> None:
        """Begin to answer. To be called in the running event loop."""
        self._serving = asyncio.create_task(self.serve([self.sock]), name="metrics port")

    async def close(self) -> None:
        """Stop answering; what is being scraped is broken off."""
        self._serving.cancel()
        with suppress(asyncio.CancelledError):
            await self._serving

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
