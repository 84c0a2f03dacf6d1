"""The leases a worker has, and room for more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from server.jobs import Lease
from server.metrics import Metrics


@dataclass(eq=False)
class Held:
    """A lease this worker has. tail: the last of its encoding tasks; the next waits for it.

    watch: waits for the end of its job, whoever ends it. engine: that makes it, once its rows have started.
    """

    lease: Lease
    watch: asyncio.Task[None]
    engine: str = ""
    tail: asyncio.Task[None] | None = None


class Holdings:
    """By token. rows: images in the making, those being encoded included."""

    def __init__(self, metrics: Metrics) -> None:
        self.rows = 0
        self._metrics = metrics
        self._held: dict[str, Held] = {}
        self._freed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, token: str) -> bool:
        return token in self._held

    def __iter__(self) -> Iterator[Held]:
        """As of now: what is iterated over may be released meanwhile."""
        return iter(list(self._held.values()))

    @property
    def leases(self) -> list[Lease]:
        return [held.lease for held in self]

    def get(self, token: str) -> Held | None:
        return self._held.get(token)

    def take(self, lease: Lease, watch: asyncio.Task[None]) -> None:
        self._held[lease.token] = Held(lease, watch)
        self._count(lease.job.request.n)

    def release(self, held: Held) -> None:
        """Its rows are free; nothing when they were already."""
        if self._held.pop(held.lease.token, None) is not None:
            held.watch.cancel()
            self._count(-held.lease.job.request.n)
            self._freed.set()

    async def until_freed(self) -> None:
        """Wait for the next release."""
        self._freed.clear()
        await self._freed.wait()

    def _count(self, rows: int) -> None:
        self.rows += rows
        self._metrics.rows.set(self.rows)
