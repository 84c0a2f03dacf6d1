"""What the store raises when its client fails."""

from __future__ import annotations

import asyncio

import pytest
from redis.exceptions import TimeoutError as RedisTimeoutError

from server.stores.base import StoreUnavailableError
from server.stores.redis.errors import translated

pytestmark = pytest.mark.anyio


async def call_that_makes_a_connection(entered: asyncio.Event) -> None:
    with translated():
        try:
            entered.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise RedisTimeoutError("as the client does") from None


async def test_a_cancellation_taken_for_a_timeout_is_a_cancellation_again() -> None:
    entered = asyncio.Event()
    task = asyncio.create_task(call_that_makes_a_connection(entered))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_timeout_is_an_outage() -> None:
    with pytest.raises(StoreUnavailableError), translated():
        raise RedisTimeoutError("late")
