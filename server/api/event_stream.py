"""Server-sent events as they go out: at once, and never so long without a word that a proxy ends the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

EVENT_STREAM = "text/event-stream"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
"""The latter is nginx's: its proxies would hold events back until there are some kilobytes of them."""

KEEP_ALIVE_S = 15.0
_COMMENT = ": still there\n\n"


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


async def _next(lines: AsyncIterator[str]) -> str | None:
    return await anext(lines, None)
