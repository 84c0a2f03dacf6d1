"""Rate limits and quotas, counted in this process or, where several share them, in Redis."""

from __future__ import annotations

import math
import time
from typing import Any

import limits
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError

from server.stores.base import StoreUnavailableError


class Rates:
    """redis_url: where to count, None for this process alone; answer_s: as for the job store."""

    def __init__(self, redis_url: str | None = None, answer_s: float | None = None) -> None:
        self._limiter = SlidingWindowCounterRateLimiter(_storage(redis_url, answer_s))

    async def spend(self, rate: str | None, amount: int, *who: str) -> float | None:
        """Take ``amount`` from what the rate allows, or say in how many seconds there may be some again.

        Infinity where the rate never allows so many at once.

        Raises: StoreUnavailableError.
        """
        if rate is None:
            return None
        item = limits.parse(rate)
        if amount > item.amount:
            return math.inf
        try:
            if await self._limiter.hit(item, *who, cost=amount):
                return None
            reset_s = (await self._limiter.get_window_stats(item, *who)).reset_time - time.time()
        except StorageError as error:
            raise StoreUnavailableError("the store of rate limits cannot be reached") from error
        return max(reset_s, 0.001)


def _storage(redis_url: str | None, answer_s: float | None) -> MemoryStorage | RedisStorage:
    if redis_url is None:
        return MemoryStorage()
    from server.stores.redis.connections import ANSWER_S, connect  # noqa: PLC0415 - only where used

    pool: Any = connect(redis_url, answer_s or ANSWER_S)
    # The pool knows the address; the storage's own clients have no deadline and read no unix://.
    return RedisStorage("async+redis://", wrap_exceptions=True, implementation="redispy", connection_pool=pool)
