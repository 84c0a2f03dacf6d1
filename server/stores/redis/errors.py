"""What the store raises when Redis does not do its part."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from redis.exceptions import RedisError

from server.stores.base import StoreUnavailableError


@contextmanager
def translated() -> Iterator[None]:
    """Raises: StoreUnavailableError for whatever goes wrong with Redis.

    While it makes a connection the client turns a cancellation into a timeout; it is one again here, for those who
    try again after an outage would never end.
    """
    try:
        yield
    except (RedisError, OSError) as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError from error
        raise StoreUnavailableError(f"the job store does not answer: {error}") from error
