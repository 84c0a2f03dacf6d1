"""A client that goes away takes its job with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from starlette.requests import Request

from server.service import Service

_log = structlog.get_logger()


@asynccontextmanager
async def cancelled_when_gone(service: Service, request: Request, job_id: str) -> AsyncIterator[None]:
    """Cancel the job as soon as its client disconnects; its rows leave at the next step."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        if await service.store.cancel(job_id):
            _log.info("client_disconnected", job=job_id)

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
