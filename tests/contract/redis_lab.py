"""A Redis store whose server's clock seems to have moved."""

from __future__ import annotations

import atexit
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache

from redis import Redis

from server.stores.redis.store import RedisStore
from tests.contract.lab import LEASE_S, RESULT_TTL_S, Lab
from tests.support.redis_server import RedisServer

PREFIX = "t:"
SLOW_MACHINE_S = 15.0


@asynccontextmanager
async def redis_lab(binary: str, result_ttl_s: float = RESULT_TTL_S) -> AsyncIterator[Lab]:
    server = _server(binary)
    server.client.flushall()
    store = RedisStore(server.url, LEASE_S, result_ttl_s, answer_s=SLOW_MACHINE_S, prefix=PREFIX)

    async def pass_time(seconds: float) -> None:
        make_older(server.client, round(seconds * 1000))

    try:
        yield Lab(store, pass_time)
    finally:
        await store.close()


@cache
def _server(binary: str) -> RedisServer:
    """One a test process, and an empty one for each test."""
    server = RedisServer(binary)
    atexit.register(server.__exit__, None, None, None)
    return server


def make_older(client: Redis, ms: int) -> None:
    """Nobody can move the server's clock, so everything it has written down is moved into the past."""
    for key in client.scan_iter(f"{PREFIX}*"):
        name = key.decode().removeprefix(PREFIX)
        if name.startswith("job:"):
            for field in ("created", "since", "deadline"):
                if client.hget(key, field):
                    client.hincrby(key, field, -ms)
        elif name.startswith("delivery:"):
            client.hincrby(key, "ended", -ms)
        elif name in ("deadlines", "outbox") or name.startswith("queue:"):
            for member in client.zrange(key, 0, -1):
                client.zincrby(key, -ms, member)
        elif name.startswith(("lane:", "returned:")):
            for pending in client.xpending_range(key, "workers", "-", "+", 1000):
                idle = pending["time_since_delivered"] + ms
                client.xclaim(key, "workers", pending["consumer"], 0, [pending["message_id"]], idle, justid=True)
        left_ms = client.pttl(key)
        if left_ms > 0 and (left_ms <= ms or not client.pexpire(key, left_ms - ms)):
            client.delete(key)
