"""How long those who wait for a job bear with a Redis that does not answer. It is a fake one here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from types import SimpleNamespace
from typing import TypeVar

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from server.jobs import JobStatus
from server.stores.base import StoreUnavailableError
from server.stores.redis import patience
from server.stores.redis.store import RedisStore
from tests.contract.lab import job

pytestmark = pytest.mark.anyio

T = TypeVar("T")


class FakeRedis:
    """Knows one job, which has succeeded. failures: how often each call does so before it answers."""

    def __init__(self, failures: float) -> None:
        self._failures = failures
        self.calls: dict[str, int] = {}

    async def hget(self, *_: str) -> bytes:
        return self._answer("hget", b"succeeded")

    async def hgetall(self, _: str) -> dict[bytes, bytes]:
        data = job("a").model_dump_json().encode()
        fields = {b"status": b"succeeded", b"created": b"0", b"attempt": b"1", b"step": b"4", b"data": data}
        return self._answer("hgetall", fields)

    async def xrange(self, *_: object) -> list[tuple[bytes, dict[bytes, bytes]]]:
        return self._answer("xrange", [(b"1-0", {b"type": b"succeeded", b"step": b"4"})])

    def _answer(self, call: str, answer: T) -> T:
        self.calls[call] = self.calls.get(call, 0) + 1
        if self.calls[call] <= self._failures:
            raise RedisConnectionError("cut")
        return answer


Opened = Callable[[float], tuple[RedisStore, FakeRedis]]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    """A store on a fake Redis, to which signals do not come."""

    def make(failures: float) -> tuple[RedisStore, FakeRedis]:
        store, redis = RedisStore("unix:///nothing/there"), FakeRedis(failures)
        monkeypatch.setattr(store, "_redis", redis)
        return store, redis

    monkeypatch.setattr(patience, "RETRY_S", 0.001)
    return make


async def told(store: RedisStore) -> list[str]:
    return [event.type async for event in store.events("a")]


async def test_every_read_of_those_who_wait_is_repeated(opened: Opened) -> None:
    store, redis = opened(3)
    assert (await store.wait("a")).status is JobStatus.SUCCEEDED
    assert redis.calls == {"hget": 4, "hgetall": 4}
    assert await told(store) == ["succeeded"]
    assert redis.calls["xrange"] == 4
    await store._signals.close()


async def test_an_outage_that_lasts_is_told(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=count().__next__)
    monkeypatch.setattr(patience, "time", clock)
    monkeypatch.setattr(patience, "OUTAGE_S", 5)
    store, redis = opened(float("inf"))
    for call in (store.until_ended("a"), store.wait("a"), told(store)):
        redis.calls.clear()
        with pytest.raises(StoreUnavailableError):
            await call
        assert redis.calls == {"hget": patience.OUTAGE_S}, "a second each, by this clock"
    await store._signals.close()


async def test_whoever_does_not_wait_is_told_at_once(opened: Opened) -> None:
    store, redis = opened(float("inf"))
    with pytest.raises(StoreUnavailableError):
        await store.get("a")
    assert redis.calls == {"hgetall": 1}


async def test_a_cancellation_that_the_client_loses_is_one_all_the_same() -> None:
    reading = asyncio.Event()

    async def loses() -> str:
        reading.set()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return "an answer"

    reads = asyncio.create_task(patience.patiently(loses))
    await reading.wait()
    reads.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reads
