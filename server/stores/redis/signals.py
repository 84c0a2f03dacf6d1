"""Waking those who wait for a job or for work. A hint, never the truth: what it says is read from the store."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from redis.asyncio import Redis
from redis.exceptions import RedisError

ARRIVED = "+"
"""Told when a job is queued. A job's id is told at every event, the id after ``!`` when it ended."""

LISTEN_S = 0.5
RECONNECT_S = 0.2


class Signals:
    """One subscription a process, made when somebody first waits, renewed after every outage."""

    def __init__(self, redis: Redis, channel: str) -> None:
        self._redis = redis
        self._channel = channel
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._pump: asyncio.Task[None] | None = None
        self._closed = False

    @contextmanager
    def on(self, topic: str) -> Iterator[asyncio.Event]:
        """An event set whenever the topic is told, and after outages, when it may have been."""
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._listen(), name="store signals")
        event = asyncio.Event()
        self._waiting.setdefault(topic, set()).add(event)
        try:
            yield event
        finally:
            self._waiting[topic].discard(event)
            if not self._waiting[topic]:
                del self._waiting[topic]

    async def close(self) -> None:
        self._closed = True  # a connection being made turns a cancellation into a timeout
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait([self._pump])

    async def _listen(self) -> None:
        while not self._closed:
            with suppress(RedisError, OSError):
                async with self._redis.pubsub() as subscription:
                    await subscription.subscribe(self._channel)
                    self._tell_all()
                    while not self._closed:
                        message = await subscription.get_message(ignore_subscribe_messages=True, timeout=LISTEN_S)
                        if message is not None:
                            self._tell(message["data"].decode())
            self._tell_all()
            await asyncio.sleep(RECONNECT_S)

    def _tell(self, topic: str) -> None:
        for event in self._waiting.get(topic, ()):
            event.set()

    def _tell_all(self) -> None:
        for topic in self._waiting:
            self._tell(topic)


async def signalled(event: asyncio.Event, timeout_s: float) -> None:
    """Wait until the event is set, and clear it; returns after timeout_s in any case."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):  # wait_for may lose a cancellation before Python 3.12
            await event.wait()
    event.clear()
