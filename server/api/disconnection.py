"""A client that goes away takes its job with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from starlette.requests import Request

from server.service import Service
from server.stores.base import StoreUnavailableError

_log = structlog.get_logger()


@asynccontextmanager
async def cancelled_when_gone(service: Service, request: Request, job_id: str) -> AsyncIterator[None]:
    """Cancel the job as soon as its client disconnects; its rows leave at the next step."""

    async def watch() -> None:
        await _gone(request)
        try:
            if await service.store.cancel(job_id):
                _log.info("client_disconnected", job=job_id)
        except StoreUnavailableError:
            service.counts.unwanted(job_id)

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()


async def _gone(request: Request) -> None:
    """Wait until the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
