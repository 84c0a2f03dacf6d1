"""The stores the contract is held against. A new store adds its lab here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from server.jobs import JobStore
from server.stores.memory import MemoryStore

LEASE_S = 10.0
RESULT_TTL_S = 60.0


@dataclass
class Lab:
    """An empty store whose time a test can move. pass_time: seconds."""

    store: JobStore
    pass_time: Callable[[float], None]


@asynccontextmanager
async def memory_lab() -> AsyncIterator[Lab]:
    now = [1000.0]

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    yield Lab(MemoryStore(LEASE_S, RESULT_TTL_S, clock=lambda: now[0]), pass_time)


LABS: dict[str, Callable[[], AbstractAsyncContextManager[Lab]]] = {"memory": memory_lab}
