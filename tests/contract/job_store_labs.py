"""The stores the contract is held against. A new store adds its lab here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

from server.stores.memory import MemoryStore
from tests.contract.lab import LEASE_S, RESULT_TTL_S, Lab
from tests.contract.redis_lab import redis_lab
from tests.support.redis_server import BINARIES


@asynccontextmanager
async def memory_lab(result_ttl_s: float = RESULT_TTL_S) -> AsyncIterator[Lab]:
    now = [1000.0]

    async def pass_time(seconds: float) -> None:
        now[0] += seconds

    yield Lab(MemoryStore(LEASE_S, result_ttl_s, clock=lambda: now[0]), pass_time)


LABS: dict[str, Callable[..., AbstractAsyncContextManager[Lab]]] = {
    "memory": memory_lab,
    **{binary: partial(redis_lab, binary) for binary in BINARIES},
}
