"""The store of a single process: everything in dictionaries, lost with the process."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass, field

from server.jobs import (
    MAX_ATTEMPTS,
    POISON,
    Backlog,
    Job,
    JobFailure,
    JobResult,
    JobState,
    JobStatus,
    Lease,
    Preview,
)


@dataclass(eq=False)
class _Record:
    job: Job
    since: float
    """Clock of the last change of status, or of the lease's last heartbeat."""
    status: JobStatus = JobStatus.QUEUED
    worker: str = ""
    attempt: int = 0
    step: int = 0
    previews: tuple[Preview, ...] = ()
    result: JobResult | None = None
    failure: JobFailure | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def state(self) -> JobState:
        return JobState(
            job=self.job,
            status=self.status,
            attempt=self.attempt,
            step=self.step,
            previews=self.previews,
            result=self.result,
            failure=self.failure,
        )

    def held_by(self, lease: Lease) -> bool:
        return self.status is JobStatus.RUNNING and (self.worker, self.attempt) == (lease.worker, lease.attempt)

    def notify(self) -> None:
        """Wake the watchers; each then waits on a fresh event."""
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


class MemoryStore:
    """A JobStore for one event loop. clock: monotonic seconds; lease_s and result_ttl_s: see Settings."""

    def __init__(
        self, lease_s: float = 30.0, result_ttl_s: float = 300.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lease_s = lease_s
        self._result_ttl_s = result_ttl_s
        self._clock = clock
        self._records: dict[str, _Record] = {}
        self._queue: OrderedDict[str, _Record] = OrderedDict()
        self._arrived = asyncio.Event()
        self._open_jobs, self._open_rows, self._open_s = 0, 0, 0.0

    async def submit(self, job: Job) -> None:
        if job.id in self._records:
            raise ValueError("a job with this id exists")
        record = _Record(job, self._clock())
        self._records[job.id] = self._queue[job.id] = record
        self._count(job, 1)
        self._arrived.set()

    async def claim(self, worker: str, rows: int, wait_s: float = 0.0) -> list[Lease]:
        leases = self._take(worker, rows)
        if leases or wait_s <= 0:
            return leases
        self._arrived.clear()
        try:
            await asyncio.wait_for(self._arrived.wait(), wait_s)
        except TimeoutError:
            return []
        return self._take(worker, rows)

    async def heartbeat(self, leases: Collection[Lease]) -> frozenset[str]:
        now, stop = self._clock(), []
        for lease in leases:
            record = self._records.get(lease.job.id)
            if record is None or not record.held_by(lease):
                stop.append(lease.token)
            else:
                record.since = now
        return frozenset(stop)

    async def progress(self, lease: Lease, step: int, previews: Sequence[Preview] = ()) -> None:
        record = self._records.get(lease.job.id)
        if record is not None and record.held_by(lease):
            record.step = step
            record.previews += tuple(previews)
            record.notify()

    async def finish(self, lease: Lease, result: JobResult) -> bool:
        record = self._records.get(lease.job.id)
        if record is None or not record.held_by(lease):
            return False
        record.result = result
        record.step = record.job.request.steps
        self._end(record, JobStatus.SUCCEEDED)
        return True

    async def fail(self, lease: Lease, failure: JobFailure) -> bool:
        record = self._records.get(lease.job.id)
        if record is None or not record.held_by(lease):
            return False
        record.failure = failure
        self._end(record, JobStatus.FAILED)
        return True

    async def cancel(self, job_id: str) -> bool:
        record = self._open(job_id)
        if record is None:
            return False
        self._end(record, JobStatus.CANCELLED)
        return True

    async def abandon(self, job_id: str, failure: JobFailure) -> bool:
        record = self._open(job_id)
        if record is None:
            return False
        record.failure = failure
        self._end(record, JobStatus.FAILED)
        return True

    async def get(self, job_id: str) -> JobState | None:
        record = self._records.get(job_id)
        return None if record is None else record.state()

    async def wait(self, job_id: str) -> JobState:
        record = self._records[job_id]
        await record.ended.wait()
        return record.state()

    async def watch(self, job_id: str) -> AsyncIterator[JobState]:
        record = self._records[job_id]
        while True:
            changed, state = record.changed, record.state()
            yield state
            if state.status.terminal:
                return
            await changed.wait()

    async def forget(self, job_id: str) -> None:
        record = self._records.get(job_id)
        if record is not None and record.status.terminal:
            del self._records[job_id]

    async def backlog(self) -> Backlog:
        return Backlog(jobs=self._open_jobs, rows=self._open_rows, seconds=max(0.0, self._open_s))

    async def reap(self) -> int:
        now, taken = self._clock(), []
        for job_id, record in list(self._records.items()):
            if record.status is JobStatus.RUNNING and now - record.since > self._lease_s:
                if record.attempt >= MAX_ATTEMPTS:
                    record.failure = POISON
                    self._end(record, JobStatus.FAILED)
                    continue
                record.status, record.worker, record.since, record.previews = JobStatus.QUEUED, "", now, ()
                taken.append(record)
            elif record.status.terminal and now - record.since > self._result_ttl_s:
                del self._records[job_id]
        for record in reversed(taken):  # they are the oldest: ahead of the queue, in their old order
            self._queue[record.job.id] = record
            self._queue.move_to_end(record.job.id, last=False)
            record.notify()
        if taken:
            self._arrived.set()
        return len(taken)

    def _open(self, job_id: str) -> _Record | None:
        record = self._records.get(job_id)
        return None if record is None or record.status.terminal else record

    def _take(self, worker: str, rows: int) -> list[Lease]:
        now, free, leases = self._clock(), rows, []
        while self._queue:
            record = next(iter(self._queue.values()))
            if record.job.request.n > free:
                break
            self._queue.popitem(last=False)
            free -= record.job.request.n
            queued_ms = (now - record.since) * 1000
            record.status, record.worker, record.since = JobStatus.RUNNING, worker, now
            record.attempt += 1
            record.notify()
            leases.append(Lease(job=record.job, worker=worker, attempt=record.attempt, queued_ms=queued_ms))
        return leases

    def _end(self, record: _Record, status: JobStatus) -> None:
        self._queue.pop(record.job.id, None)
        record.status, record.since = status, self._clock()
        self._count(record.job, -1)
        record.ended.set()
        record.notify()

    def _count(self, job: Job, sign: int) -> None:
        self._open_jobs += sign
        self._open_rows += sign * job.request.n
        self._open_s += sign * job.cost_s
