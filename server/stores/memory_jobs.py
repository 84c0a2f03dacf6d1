"""The jobs of the memory store and how they change; nothing here waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from server.jobs import (
    MAX_ATTEMPTS,
    MAX_CRASHES,
    POISON,
    IdempotencyConflictError,
    IdempotencyKey,
    Job,
    JobFailure,
    JobStatus,
    Lease,
    Submission,
)
from server.stores.fair_queue import FairQueue
from server.stores.memory_counts import MemoryCounts
from server.stores.memory_outbox import MemoryOutbox
from server.stores.memory_record import Record


class MemoryJobs:
    """lease_s and result_ttl_s: see Settings; clock: monotonic seconds."""

    def __init__(self, lease_s: float, result_ttl_s: float, clock: Callable[[], float]) -> None:
        self._lease_s = lease_s
        self._result_ttl_s = result_ttl_s
        self._clock = clock
        self._epoch = time.time() - clock()
        self.records: dict[str, Record] = {}
        self.counts = MemoryCounts()
        self.keys: dict[tuple[str, str], tuple[IdempotencyKey, str]] = {}
        self.queue = FairQueue()
        self.outbox = MemoryOutbox(lease_s, clock)

    def submit(self, job: Job, key: IdempotencyKey | None) -> Submission:
        """Raises: see JobStore.submit."""
        if key is not None and (key.tenant, key.key) in self.keys:
            earlier, job_id = self.keys[key.tenant, key.key]
            if earlier != key:
                raise IdempotencyConflictError
            return Submission(job_id=job_id, replayed=True)
        if job.id in self.records:
            raise ValueError("a job with this id exists")
        now = self._clock()
        job = job.model_copy(update={"created_s": self._epoch + now})
        deadline = None if job.deadline_ms is None else now + job.deadline_ms / 1000
        record = Record(job, key, now, deadline, now)
        self.records[job.id] = record
        if key is not None:
            self.keys[key.tenant, key.key] = (key, job.id)
        self.queue.add(job)
        self.counts.accepted(job)
        record.tell("queued")
        return Submission(job_id=job.id)

    def take(self, worker: str, models: Collection[str], rows: int) -> list[Lease]:
        """What is next and fits, now leased."""
        now, leases = self._clock(), list[Lease]()
        while (job := self.queue.head(models)) is not None:
            record = self.records[job.id]
            if record.past(now):
                self.expire(record)
                continue
            if job.request.n > rows or (record.alone and leases):
                break
            self.queue.take(job)
            rows -= job.request.n
            record.status, record.worker, record.step = JobStatus.RUNNING, worker, 0
            record.attempt += 1
            record.tell("running")
            leases.append(record.lease(now))
            if record.alone:
                break
        return leases

    def open(self, job_id: str) -> Record | None:
        """A job that is not terminal."""
        record = self.records.get(job_id)
        return None if record is None or record.status.terminal else record

    def held(self, lease: Lease) -> Record | None:
        """The job of a lease, while it holds."""
        record = self.records.get(lease.job.id)
        return record if record is not None and record.held_by(lease) else None

    def requeue(self, record: Record) -> bool:
        """Queue a job again unless it took too much with it; whether it was."""
        if record.lost >= MAX_ATTEMPTS or record.crashes >= MAX_CRASHES:
            return not self.fail(record, POISON)
        record.status, record.worker, record.since, record.step = JobStatus.QUEUED, "", self._clock(), 0
        self.queue.give_back(record.job)
        record.tell("queued")
        return True

    def expire(self, record: Record) -> bool:
        """End a job whose deadline has passed; whether it has."""
        if not record.past(self._clock()):
            return False
        self.end(record, JobStatus.EXPIRED)
        return True

    def fail(self, record: Record | None, failure: JobFailure) -> bool:
        if record is None:
            return False
        record.failure = failure
        self.end(record, JobStatus.FAILED)
        return True

    def end(self, record: Record, status: JobStatus) -> None:
        job = record.job
        self.queue.remove(job.id)
        record.status, record.since = status, self._clock()
        self.counts.ended(job, status)
        if job.webhook_url is not None:
            self.outbox.add(job, status, self._epoch + record.since)
        record.tell(status.value)

    def expire_late(self) -> None:
        """End the jobs whose deadline has passed."""
        for record in list(self.records.values()):
            self.expire(record)

    def reap(self) -> int:
        """Queue silent jobs again, end and drop late ones; returns how many were queued."""
        self.expire_late()
        now, queued = self._clock(), 0
        for record in list(self.records.values()):
            if record.status is JobStatus.RUNNING and now - record.since > self._lease_s:
                record.lost += 1
                queued += self.requeue(record)
            elif record.status.terminal and now - record.since > self._result_ttl_s:
                self._drop(record)
        return queued

    def forget(self, job_id: str) -> None:
        """Drop a terminal job without a key."""
        record = self.records.get(job_id)
        if record is not None and record.status.terminal and record.key is None:
            self._drop(record)

    def _drop(self, record: Record) -> None:
        del self.records[record.job.id]
        if record.key is not None:
            del self.keys[record.key.tenant, record.key.key]
