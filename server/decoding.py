"""Callers' files are decoded beside the event loop: a few edits at a time, and not many more wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from server.errors import OverloadedError
from server.request import DenoiseRequest

DECODES_AT_ONCE = 2
"""At the largest size each takes some 0.3 GiB."""

MAX_WAITING = 16
"""Edits that wait for their turn, each with its files."""

RETRY_S = 1.0

Decode = Callable[[], DenoiseRequest]
"""Makes a request of its files; called on a thread."""


class Decoding:
    """Where edits take turns."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(DECODES_AT_ONCE)
        self._waiting = 0

    async def run(self, decode: Decode, check: Callable[[], Awaitable[None]]) -> DenoiseRequest:
        """What ``decode`` makes, once its turn has come and ``check`` does not raise.

        A caller that is cancelled while it waits leaves nothing to do; a turn lasts as long as its thread.

        Raises: OverloadedError when too many wait; what ``check`` and ``decode`` raise.
        """
        await self._turn()
        try:
            await check()
            decoding = asyncio.ensure_future(asyncio.to_thread(decode))
            try:
                return await asyncio.shield(decoding)
            finally:
                await asyncio.wait([decoding])
        finally:
            self._turns.release()

    async def _turn(self) -> None:
        if self._waiting >= MAX_WAITING:
            message = "Too many images wait to be decoded; the Retry-After header says when to try again."
            raise OverloadedError("queue_full", message, retry_after_s=RETRY_S)
        self._waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self._waiting -= 1
