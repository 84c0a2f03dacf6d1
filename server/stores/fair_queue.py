"""The order in which queued jobs are claimed. Pure: no clock, no I/O.

Between tenants, the one that was served least predicted seconds goes next (start-time fair queueing: a tenant
that comes back after a pause starts level with the others, without credit). Within a tenant, a level of priority
is worth ``PRIORITY_S`` of age, so that none waits for ever. Jobs given back by workers come before all others.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterator
from typing import NamedTuple

from server.jobs import PRIORITY_S, Job

MIN_COST_S = 0.001
"""Charged for a job that is predicted to cost nothing, so that tenants still take turns."""


class _Entry(NamedTuple):
    rank: tuple[float, int]
    job: Job


class FairQueue:
    """Queued jobs. accepted: their numbers in order of acceptance, by id."""

    def __init__(self) -> None:
        self._accepted = 0
        self._entries: dict[str, _Entry] = {}
        self._returned: list[_Entry] = []
        self._waiting: dict[str, list[_Entry]] = {}
        """By tenant, in order; tenants without jobs are not here."""
        self._served_s: dict[str, float] = {}
        self._level_s = 0.0
        """What the tenant served last had been served before."""

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, job: Job) -> None:
        """Queue a newly accepted job."""
        self._accepted += 1
        entry = _Entry((job.created_s - job.priority * PRIORITY_S, self._accepted), job)
        if job.tenant not in self._waiting:
            self._served_s[job.tenant] = max(self._level_s, self._served_s.get(job.tenant, 0.0))
        insort(self._waiting.setdefault(job.tenant, []), entry, key=lambda e: e.rank)
        self._entries[job.id] = entry

    def give_back(self, job: Job) -> None:
        """Queue a job that was taken before, ahead of all that were not."""
        entry = _Entry((job.created_s, 0), job)
        insort(self._returned, entry, key=lambda e: e.rank)
        self._entries[job.id] = entry

    def head(self, models: Collection[str]) -> Job | None:
        """The next job of one of these models."""
        entries = [*self._returned, *(entry for entry in self._fair_heads(models))]
        return next((entry.job for entry in entries if entry.job.request.model in models), None)

    def _fair_heads(self, models: Collection[str]) -> Iterator[_Entry]:
        """Each tenant's first, the tenant served least before; between equals, the older."""
        for tenant in sorted(self._waiting, key=lambda t: (self._served_s[t], self._waiting[t][0].rank)):
            yield from (entry for entry in self._waiting[tenant] if entry.job.request.model in models)

    def take(self, job: Job) -> None:
        """Remove a job to be worked on; its tenant pays when this is its first time."""
        if self._entries[job.id] not in self._returned:
            self._level_s = self._served_s[job.tenant]
            self._served_s[job.tenant] += max(job.cost_s, MIN_COST_S)
        self.remove(job.id)

    def remove(self, job_id: str) -> None:
        entry = self._entries.pop(job_id, None)
        if entry is None:
            return
        if entry in self._returned:
            self._returned.remove(entry)
            return
        waiting = self._waiting[entry.job.tenant]
        waiting.remove(entry)
        if not waiting:
            del self._waiting[entry.job.tenant]

    def position(self, job_id: str) -> int | None:
        """How many jobs are expected to go first; None for one that is not queued."""
        entry = self._entries.get(job_id)
        if entry is None:
            return None
        if entry in self._returned:
            return self._returned.index(entry)
        ahead = self._waiting[entry.job.tenant].index(entry)
        others = (len(jobs) for tenant, jobs in self._waiting.items() if tenant != entry.job.tenant)
        return len(self._returned) + ahead + sum(min(count, ahead) for count in others)
