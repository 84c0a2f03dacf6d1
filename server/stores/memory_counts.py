"""What the memory store counts: open work, of all, each tenant and each model, and all that ever came and ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from server.jobs import Backlog, Job, JobStatus, Total


class _Open:
    """Work that is not finished."""

    def __init__(self) -> None:
        self.jobs, self.rows, self.seconds = 0, 0, 0.0

    def add(self, job: Job, sign: int) -> None:
        self.jobs += sign
        self.rows += sign * job.request.n
        self.seconds += sign * job.cost_s

    def backlog(self) -> Backlog:
        return Backlog(jobs=self.jobs, rows=self.rows, seconds=max(0.0, self.seconds))


class MemoryCounts:
    """Tenants and models without open work are not kept."""

    def __init__(self) -> None:
        self._all = _Open()
        self._tenants: dict[str, _Open] = {}
        self._models: dict[str, _Open] = {}
        self._totals: Counter[tuple[str, str, JobStatus | None]] = Counter()

    def accepted(self, job: Job) -> None:
        self._all.add(job, 1)
        self._tenants.setdefault(job.tenant, _Open()).add(job, 1)
        self._models.setdefault(job.request.model, _Open()).add(job, 1)
        self._totals[job.request.model, job.request.task, None] += 1

    def ended(self, job: Job, status: JobStatus) -> None:
        self._all.add(job, -1)
        for kept, name in ((self._tenants, job.tenant), (self._models, job.request.model)):
            kept[name].add(job, -1)
            if kept[name].jobs == 0:
                del kept[name]
        self._totals[job.request.model, job.request.task, status] += 1

    def backlog(self, tenant: str | None) -> Backlog:
        return self._all.backlog() if tenant is None else self._tenants.get(tenant, _Open()).backlog()

    def backlog_for(self, models: Collection[str]) -> Backlog:
        return sum((self._models[model].backlog() for model in set(models) & self._models.keys()), Backlog())

    def totals(self) -> list[Total]:
        return [Total(model=m, task=t, status=s, count=count) for (m, t, s), count in self._totals.items()]
