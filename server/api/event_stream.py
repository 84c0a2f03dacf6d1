"""Server-sent events as they go out: at once, and never so long without a word that a proxy ends the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import structlog

from server.errors import ApiError, result_store_away, store_away, unreadable_job
from server.storage import ResultStoreError
from server.stores.base import StoreUnavailableError, UnreadableJobError

EVENT_STREAM = "text/event-stream"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
"""The latter is nginx's: its proxies would hold events back until there are some kilobytes of them."""

KEEP_ALIVE_S = 15.0
_COMMENT = ": still there\n\n"

_log = structlog.get_logger()


async def with_error_event(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """Lines of an answer under way, whose status is sent: whatever goes wrong from here on is the last of them."""
    try:
        async for line in lines:
            yield line
    except ResultStoreError:
        yield _error(result_store_away())
    except (StoreUnavailableError, KeyError):  # away; or it came back without what it held
        yield _error(store_away())
    except UnreadableJobError as error:
        _log.error("job_unreadable", reason=str(error))
        yield _error(unreadable_job())
    except ApiError as error:
        yield _error(error)


async def kept_alive(lines: AsyncIterator[str], leaving: asyncio.Event | None = None) -> AsyncIterator[str]:
    """The lines, with a comment, which clients skip, whenever none has come for a while.

    leaving: when it is set, the lines end with what has come.
    """
    coming = asyncio.create_task(_next(lines))
    left = asyncio.create_task((leaving or asyncio.Event()).wait())
    try:
        while True:
            await asyncio.wait((coming, left), timeout=KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                if left.done():
                    return
                yield _COMMENT
                continue
            line = coming.result()
            if line is None:
                return
            yield line
            coming = asyncio.create_task(_next(lines))
    finally:
        left.cancel()
        if not coming.done():
            coming.cancel()
            with suppress(asyncio.CancelledError):
                await coming


def _error(error: ApiError) -> str:
    return f"data: {error.payload().decode()}\n\n"


async def _next(lines: AsyncIterator[str]) -> str | None:
    return await anext(lines, None)
