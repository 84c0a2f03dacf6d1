"""The way into the queue: a job is let in, or refused, by what the queue holds and what is just entering it."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from server.admission import Admission
from server.auth import Keyring
from server.costs import CostBook
from server.jobs import Backlog, Job
from server.stores.base import JobStore


class Arrivals:
    """Jobs let in here that a look at the queue may not have seen: of a burst, each is to see the others.

    A job that arrives while a look is under way may be counted twice: rather a refusal too many.
    """

    def __init__(self) -> None:
        self._looks: dict[object, float] = {}
        """When each look under way began."""
        self._jobs: dict[str, tuple[Job, float]] = {}
        """With the time from which a look sees the job."""
        self._time = 0

    @contextmanager
    def looking(self) -> Iterator[Callable[[], list[Job]]]:
        """Around the look; the call within it says which jobs may not have been seen."""
        look, began = object(), self._tick()
        self._looks[look] = began
        try:
            yield lambda: [job for job, seen in self._jobs.values() if seen > began]
        finally:
            del self._looks[look]
            self._drop_seen()

    @contextmanager
    def entering(self, job: Job) -> Iterator[None]:
        """From the decision to let it in until the queue has it; nothing where it comes to nothing."""
        self._jobs[job.id] = (job, math.inf)
        try:
            yield
        except BaseException:
            del self._jobs[job.id]
            raise
        self._jobs[job.id] = (job, self._tick())
        self._drop_seen()

    def _tick(self) -> int:
        self._time += 1
        return self._time

    def _drop_seen(self) -> None:
        oldest = min(self._looks.values(), default=math.inf)
        for name in [name for name, (_, seen) in self._jobs.items() if seen <= oldest and seen < math.inf]:
            del self._jobs[name]


@dataclass(frozen=True)
class Entrance:
    """keyring: whose tenants each have a share of the queue, where there is more than one."""

    admission: Admission
    store: JobStore
    costs: CostBook
    keyring: Keyring | None
    _arrivals: Arrivals = field(default_factory=Arrivals)

    @asynccontextmanager
    async def open_to(self, job: Job) -> AsyncIterator[None]:
        """The block puts the job into the queue.

        Raises: OverloadedError; RateError where the tenant's share is full; StoreUnavailableError.
        """
        with self._arrivals.looking() as unseen:
            await self._look(job, unseen)
            entering = self._arrivals.entering(job)
        with entering:
            yield

    async def check(self, job: Job) -> None:
        """Whether it would be let in now. Raises: as ``open_to``."""
        with self._arrivals.looking() as unseen:
            await self._look(job, unseen)

    async def _look(self, job: Job, unseen: Callable[[], list[Job]]) -> None:
        shared = self.keyring is not None and len(self.keyring.tenants) > 1
        own = await self.store.backlog(job.tenant) if shared else None
        work = await self.store.backlog(models=self.costs.sharing(job.request.model)[1])
        # From here to where a job that is let in is known to be entering nothing waits.
        self._check_room(job, own, work, unseen())

    def _check_room(self, job: Job, own: Backlog | None, work: Backlog, unseen: Sequence[Job]) -> None:
        """own: the tenant's, None where it has no share of its own; unseen: jobs to be added to both."""
        workers, models = self.costs.sharing(job.request.model)
        if own is not None:
            own = sum((_work_of(each) for each in unseen if each.tenant == job.tenant), own)
            self.admission.check_share(own, job.request, self.costs.workers)
        work = sum((_work_of(each) for each in unseen if each.request.model in models), work)
        self.admission.check(work, job.request, job.deadline_ms, workers)


def _work_of(job: Job) -> Backlog:
    """What it adds to the queue."""
    return Backlog(jobs=1, rows=job.request.n, seconds=job.cost_s)
