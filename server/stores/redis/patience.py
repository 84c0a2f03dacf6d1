"""Reads of those who wait for a job: an outage of Redis is borne for a while, as a read is safe to repeat."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from server.stores.base import StoreUnavailableError

OUTAGE_S = 1.0
"""Longer than a cut connection or a stalled fsync takes; and the last read's own limit still ends within 2 s, when
whoever waits is to be told."""

RETRY_S = 0.2

P = ParamSpec("P")
T = TypeVar("T")


async def patiently(read: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Read until there is an answer. Raises: StoreUnavailableError once there was none for ``OUTAGE_S``.

    The client loses a cancellation that comes while it takes a connection; it is one again here, for those who
    follow a job would never end.
    """
    task, give_up_s = asyncio.current_task(), time.monotonic() + OUTAGE_S
    cancelled = task.cancelling() if task else 0
    while True:
        try:
            answer = await read(*args, **kwargs)
            if task and task.cancelling() > cancelled:
                raise asyncio.CancelledError
            return answer
        except StoreUnavailableError:
            if time.monotonic() >= give_up_s:
                raise
            await asyncio.sleep(RETRY_S)
