"""Rate limits and quotas, counted in this process or, where several share them, in Redis."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any

import limits
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError

from server.stores.base import StoreUnavailableError

AskRate = Callable[..., Awaitable[float | None]]
"""``Rates.spend`` or ``Rates.wait_s``."""


class Rates:
    """redis_url: where to count, None for this process alone; answer_s: as for the job store."""

    def __init__(self, redis_url: str | None = None, answer_s: float | None = None) -> None:
        self._storage = _storage(redis_url, answer_s)
        self._limiter = SlidingWindowCounterRateLimiter(self._storage)

    async def spend(self, rate: str | None, amount: int, *who: str) -> float | None:
        """Take ``amount`` from what the rate allows, or say in how many seconds it may be had.

        That is once so much is free, if nobody takes of it; infinity where the rate never allows so much at once.

        Raises: StoreUnavailableError.
        """
        return await self._ask(self._limiter.hit, rate, amount, who)

    async def wait_s(self, rate: str | None, amount: int, *who: str) -> float | None:
        """What ``spend`` would say; nothing is taken. Raises: StoreUnavailableError."""
        return await self._ask(self._limiter.test, rate, amount, who)

    async def _ask(
        self, ask: Callable[..., Awaitable[bool]], rate: str | None, amount: int, who: tuple[str, ...]
    ) -> float | None:
        if rate is None:
            return None
        item = limits.parse(rate)
        if amount > item.amount:
            return math.inf
        try:
            if await ask(item, *who, cost=amount):
                return None
            window = await self._storage.get_sliding_window(item.key_for(*who), item.get_expiry())
        except StorageError as error:
            raise StoreUnavailableError("the store of rate limits cannot be reached") from error
        return _wait_s(item.amount - amount + 1, item.get_expiry(), *window) + 0.001


def _wait_s(below: int, window_s: float, before: int, before_left_s: float, now: int, now_left_s: float) -> float:
    """Seconds until what is counted is less than ``below``: of the window before, the share that is not over yet.

    before, now: taken in either window; their times: until either counts for nothing.
    """
    if now < below:  # which the end of the window before is enough for
        return max(0.0, before_left_s - (below - now) * window_s / max(before, 1))
    return now_left_s - below * window_s / now


def _storage(redis_url: str | None, answer_s: float | None) -> MemoryStorage | RedisStorage:
    if redis_url is None:
        return MemoryStorage()
    from server.stores.redis.connections import ANSWER_S, connect  # noqa: PLC0415 - only where used

    pool: Any = connect(redis_url, answer_s or ANSWER_S)
    # The pool knows the address; the storage's own clients have no deadline and read no unix://.
    return RedisStorage("async+redis://", wrap_exceptions=True, implementation="redispy", connection_pool=pool)
