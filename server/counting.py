"""How accepted requests ended, counted one for one by the process that accepted them."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from server.jobs import End, Job
from server.metrics import Metrics
from server.stores.base import JobStore, StoreUnavailableError

LOOK_S = 1.0
"""How often the store is asked about jobs that nobody waits for here."""

UNKNOWN = "unknown"
"""Status of a job whose end nobody saw before its time was over."""


class RequestCounts:
    """Of requests, also of those that go on as a job by themselves."""

    def __init__(self, metrics: Metrics, store: JobStore) -> None:
        self._metrics = metrics
        self._store = store
        self._followed: dict[str, Job] = {}
        self._unwanted: set[str] = set()

    @property
    def followed(self) -> frozenset[str]:
        """Jobs whose end is still to be counted."""
        return frozenset(self._followed)

    def accepted(self, job: Job) -> None:
        self._metrics.accepted.labels(job.request.model, job.request.task).inc()

    def ended(self, job: Job, end: End) -> None:
        self._metrics.ended(job.request, UNKNOWN if end.status is None else end.status.value, end.seconds)

    def follow(self, job: Job) -> None:
        """Count an accepted job now, and its end when ``run`` finds it."""
        self.accepted(job)
        self.await_end(job)

    def await_end(self, job: Job) -> None:
        """Count the end of a job when ``run`` finds it."""
        self._followed[job.id] = job

    def unwanted(self, job_id: str) -> None:
        """Cancel a job as soon as the store, which is away, can be told: its caller has been answered already."""
        self._unwanted.add(job_id)

    async def run(self) -> None:
        """Look for ends until cancelled."""
        while True:
            with suppress(StoreUnavailableError):
                await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Cancel what is unwanted, and count what has ended. Raises: StoreUnavailableError."""
        for job_id in tuple(self._unwanted):
            await self._store.cancel(job_id)
            self._unwanted.discard(job_id)
        for job_id, end in (await self._store.ends(self.followed)).items():
            job = self._followed.pop(job_id, None)
            if job is not None:
                self.ended(job, end)
