"""A client that goes away takes its job with it, and what is done before there is one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import structlog
from starlette.requests import Request

from server.api.body import client_gone
from server.service import Service
from server.stores.base import StoreUnavailableError

ValueT = TypeVar("ValueT")
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


async def unless_gone(request: Request, work: Coroutine[Any, Any, ValueT]) -> ValueT:
    """What the work comes to; it is cancelled as soon as the client disconnects. Raises: ApiError 499 then."""
    doing, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((doing, gone), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise client_gone()
        return doing.result()
    finally:
        doing.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    """Wait until the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
