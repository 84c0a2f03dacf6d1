"""The store of a single process: everything in dictionaries, lost with the process."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence

from server.costs import Offer
from server.jobs import (
    MAX_ATTEMPTS,
    MAX_CRASHES,
    POISON,
    Backlog,
    Delivery,
    IdempotencyConflictError,
    IdempotencyKey,
    Job,
    JobEvent,
    JobFailure,
    JobResult,
    JobState,
    JobStatus,
    Lease,
    Report,
    Submission,
    Total,
)
from server.stores.fair_queue import FairQueue
from server.stores.memory_outbox import MemoryOutbox
from server.stores.memory_record import Record


class MemoryStore:
    """A JobStore for one event loop. clock: monotonic seconds; lease_s and result_ttl_s: see Settings."""

    outlives_process = False

    def __init__(
        self, lease_s: float = 30.0, result_ttl_s: float = 300.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lease_s = lease_s
        self._result_ttl_s = result_ttl_s
        self._clock = clock
        self._epoch = time.time() - clock()
        self._records: dict[str, Record] = {}
        self._keys: dict[tuple[str, str], tuple[IdempotencyKey, str]] = {}
        self._queue = FairQueue()
        self._outbox = MemoryOutbox(lease_s, clock)
        self._totals: Counter[tuple[str, str, JobStatus | None]] = Counter()
        self._arrived = asyncio.Event()
        self._offers: dict[str, tuple[float, dict[str, Offer]]] = {}
        self._open_jobs, self._open_rows, self._open_s = 0, 0, 0.0

    async def submit(self, job: Job, key: IdempotencyKey | None = None) -> Submission:
        if key is not None and (key.tenant, key.key) in self._keys:
            earlier, job_id = self._keys[key.tenant, key.key]
            if earlier != key:
                raise IdempotencyConflictError
            return Submission(job_id=job_id, replayed=True)
        if job.id in self._records:
            raise ValueError("a job with this id exists")
        now = self._clock()
        job = job.model_copy(update={"created_s": self._epoch + now})
        deadline = None if job.deadline_ms is None else now + job.deadline_ms / 1000
        record = Record(job, key, now, deadline)
        self._records[job.id] = record
        if key is not None:
            self._keys[key.tenant, key.key] = (key, job.id)
        self._queue.add(job)
        self._count(job, 1)
        self._totals[job.request.model, job.request.task, None] += 1
        record.tell("queued")
        self._arrived.set()
        return Submission(job_id=job.id)

    async def claim(self, worker: str, models: Collection[str], rows: int, wait_s: float = 0.0) -> list[Lease]:
        leases = self._take(worker, models, rows)
        if leases or wait_s <= 0:
            return leases
        self._arrived.clear()
        try:
            await asyncio.wait_for(self._arrived.wait(), wait_s)
        except TimeoutError:
            return []
        return self._take(worker, models, rows)

    async def heartbeat(self, leases: Collection[Lease]) -> frozenset[str]:
        held = [(lease, self._held(lease)) for lease in leases]
        for _, record in held:
            if record is not None:
                record.since = self._clock()
        return frozenset(lease.token for lease, record in held if record is None)

    async def progress(self, reports: Sequence[Report]) -> frozenset[str]:
        stop = []
        for report in reports:
            record = self._held(report.lease)
            if record is None:
                stop.append(report.lease.token)
                continue
            record.step = report.step
            for preview in report.previews:
                record.tell("step", preview)
            record.tell("step")
        return frozenset(stop)

    async def finish(self, lease: Lease, result: JobResult) -> bool:
        record = self._held(lease)
        if record is None:
            return False
        record.result = result
        record.step = record.job.request.network_steps
        self._end(record, JobStatus.SUCCEEDED)
        return True

    async def fail(self, lease: Lease, failure: JobFailure) -> bool:
        return self._fail(self._held(lease), failure)

    async def expire(self, lease: Lease) -> bool:
        record = self._held(lease)
        return record is not None and self._expire(record)

    async def give_back(self, lease: Lease, *, crashed: bool = False) -> bool:
        record = self._held(lease)
        if record is None:
            return False
        if crashed and lease.alone:
            record.crashes += 1
        elif crashed:
            record.lost += 1
        self._requeue(record)
        return True

    async def cancel(self, job_id: str) -> bool:
        record = self._open(job_id)
        if record is None:
            return False
        self._end(record, JobStatus.CANCELLED)
        return True

    async def abandon(self, job_id: str, failure: JobFailure) -> bool:
        return self._fail(self._open(job_id), failure)

    async def get(self, job_id: str) -> JobState | None:
        record = self._records.get(job_id)
        return None if record is None else record.state(self._queue.position(job_id))

    async def wait(self, job_id: str) -> JobState:
        record = self._records[job_id]
        await record.ended.wait()
        return record.state(None)

    async def events(self, job_id: str, after: str | None = None) -> AsyncIterator[JobEvent]:
        if after is not None and not after.isdecimal():
            raise ValueError("there is no such event")
        record, told = self._records[job_id], int(after or 0)
        while True:
            changed = record.changed
            while told < len(record.events):  # it grows while its reader is busy
                told += 1
                yield record.events[told - 1]
            if record.status.terminal:
                return
            await changed.wait()

    async def forget(self, job_id: str) -> None:
        record = self._records.get(job_id)
        if record is not None and record.status.terminal and record.key is None:
            del self._records[job_id]

    async def backlog(self) -> Backlog:
        return Backlog(jobs=self._open_jobs, rows=self._open_rows, seconds=max(0.0, self._open_s))

    async def totals(self) -> list[Total]:
        return [Total(model=m, task=t, status=s, count=count) for (m, t, s), count in self._totals.items()]

    async def reap(self) -> int:
        now, queued = self._clock(), 0
        for record in list(self._records.values()):
            if record.past(now):
                self._expire(record)
            elif record.status is JobStatus.RUNNING and now - record.since > self._lease_s:
                record.lost += 1
                queued += self._requeue(record)
            elif record.status.terminal and now - record.since > self._result_ttl_s:
                self._drop(record)
        return queued

    async def announce(self, worker: str, offers: Mapping[str, Offer]) -> None:
        self._offers[worker] = (self._clock(), dict(offers))

    async def offers(self) -> dict[str, dict[str, Offer]]:
        oldest = self._clock() - self._lease_s
        return {worker: offers for worker, (heard, offers) in self._offers.items() if heard >= oldest}

    async def claim_deliveries(self, n: int) -> list[Delivery]:
        return self._outbox.claim(n)

    async def delivered(self, delivery: Delivery) -> bool:
        return self._outbox.delivered(delivery)

    async def retry_delivery(self, delivery: Delivery, delay_s: float) -> bool:
        return self._outbox.retry(delivery, delay_s)

    async def ping(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def _open(self, job_id: str) -> Record | None:
        record = self._records.get(job_id)
        return None if record is None or record.status.terminal else record

    def _held(self, lease: Lease) -> Record | None:
        record = self._records.get(lease.job.id)
        return record if record is not None and record.held_by(lease) else None

    def _take(self, worker: str, models: Collection[str], rows: int) -> list[Lease]:
        now, leases = self._clock(), list[Lease]()
        while (job := self._queue.head(models)) is not None:
            record = self._records[job.id]
            if record.past(now):
                self._expire(record)
                continue
            if job.request.n > rows or (record.alone and leases):
                break
            self._queue.take(job)
            rows -= job.request.n
            record.status, record.worker, record.step = JobStatus.RUNNING, worker, 0
            record.attempt += 1
            record.tell("running")
            leases.append(record.lease(now))
            if record.alone:
                break
        return leases

    def _requeue(self, record: Record) -> bool:
        """Queue a job again unless it took too much with it; whether it was."""
        if record.lost >= MAX_ATTEMPTS or record.crashes >= MAX_CRASHES:
            return not self._fail(record, POISON)
        record.status, record.worker, record.since, record.step = JobStatus.QUEUED, "", self._clock(), 0
        self._queue.give_back(record.job)
        record.tell("queued")
        self._arrived.set()
        return True

    def _expire(self, record: Record) -> bool:
        if not record.past(self._clock()):
            return False
        self._end(record, JobStatus.EXPIRED)
        return True

    def _fail(self, record: Record | None, failure: JobFailure) -> bool:
        if record is None:
            return False
        record.failure = failure
        self._end(record, JobStatus.FAILED)
        return True

    def _end(self, record: Record, status: JobStatus) -> None:
        job = record.job
        self._queue.remove(job.id)
        record.status, record.since = status, self._clock()
        self._count(job, -1)
        self._totals[job.request.model, job.request.task, status] += 1
        if job.webhook_url is not None:
            self._outbox.add(job, status, self._epoch + record.since)
        record.tell(status.value)

    def _drop(self, record: Record) -> None:
        del self._records[record.job.id]
        if record.key is not None:
            del self._keys[record.key.tenant, record.key.key]

    def _count(self, job: Job, sign: int) -> None:
        self._open_jobs += sign
        self._open_rows += sign * job.request.n
        self._open_s += sign * job.cost_s
