"""The store of a single process: everything in dictionaries, lost with the process."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence

from server.costs import Offer
from server.jobs import (
    Backlog,
    Delivery,
    End,
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
from server.stores.memory_jobs import MemoryJobs

_EVENT_ID = re.compile(r"[0-9]{1,20}")


class MemoryStore:
    """A JobStore for one event loop. clock: monotonic seconds; lease_s and result_ttl_s: see Settings."""

    outlives_process = False

    def __init__(
        self, lease_s: float = 30.0, result_ttl_s: float = 300.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self.jobs = MemoryJobs(lease_s, result_ttl_s, clock)
        self._arrived = asyncio.Event()
        self._offers: dict[str, tuple[float, dict[str, Offer]]] = {}

    async def submit(self, job: Job, key: IdempotencyKey | None = None) -> Submission:
        submission = self.jobs.submit(job, key)
        if not submission.replayed:
            self._arrived.set()
        return submission

    async def find_key(self, tenant: str, key: str) -> tuple[IdempotencyKey, str] | None:
        return self.jobs.keys.get((tenant, key))

    async def claim(self, worker: str, models: Collection[str], rows: int, wait_s: float = 0.0) -> list[Lease]:
        leases = self.jobs.take(worker, models, rows)
        if leases or wait_s <= 0:
            return leases
        self._arrived.clear()
        try:
            async with asyncio.timeout(wait_s):  # Python 3.11's wait_for may swallow a cancellation
                await self._arrived.wait()
        except TimeoutError:
            return []
        return self.jobs.take(worker, models, rows)

    async def heartbeat(self, leases: Collection[Lease]) -> frozenset[str]:
        held = [(lease, self.jobs.held(lease)) for lease in leases]
        for _, record in held:
            if record is not None:
                record.since = self._clock()
        return frozenset(lease.token for lease, record in held if record is None)

    async def progress(self, reports: Sequence[Report]) -> frozenset[str]:
        stop = []
        for report in reports:
            record = self.jobs.held(report.lease)
            if record is None:
                stop.append(report.lease.token)
                continue
            advanced = report.step > record.step
            record.step = max(record.step, report.step)
            for preview in report.previews:
                record.tell("step", preview)
            if advanced:
                record.tell("step")
        return frozenset(stop)

    async def finish(self, lease: Lease, result: JobResult) -> bool:
        record = self.jobs.held(lease)
        if record is None:
            return False
        record.result = result
        record.step = record.job.request.network_steps
        self.jobs.end(record, JobStatus.SUCCEEDED)
        return True

    async def fail(self, lease: Lease, failure: JobFailure) -> bool:
        return self.jobs.fail(self.jobs.held(lease), failure)

    async def expire(self, lease: Lease) -> bool:
        record = self.jobs.held(lease)
        return record is not None and self.jobs.expire(record)

    async def give_back(self, lease: Lease, *, crashed: bool = False) -> JobStatus | None:
        record = self.jobs.held(lease)
        if record is None:
            return None
        if crashed and lease.alone:
            record.crashes += 1
        elif crashed:
            record.lost += 1
        if self.jobs.requeue(record):
            self._arrived.set()
        return record.status

    async def cancel(self, job_id: str) -> bool:
        record = self.jobs.open(job_id)
        if record is None:
            return False
        self.jobs.end(record, JobStatus.CANCELLED)
        return True

    async def abandon(self, job_id: str, failure: JobFailure) -> bool:
        return self.jobs.fail(self.jobs.open(job_id), failure)

    async def get(self, job_id: str) -> JobState | None:
        record = self.jobs.records.get(job_id)
        return None if record is None else record.state(self.jobs.queue.position(job_id))

    async def wait(self, job_id: str) -> JobState:
        record = self.jobs.records[job_id]
        await record.ended.wait()
        return record.state(None)

    async def until_ended(self, job_id: str) -> None:
        record = self.jobs.records.get(job_id)
        if record is not None:
            await record.ended.wait()

    async def ends(self, job_ids: Iterable[str]) -> dict[str, End]:
        found = {job_id: self.jobs.records.get(job_id) for job_id in job_ids}
        return {
            job_id: End(status=None) if record is None else record.end
            for job_id, record in found.items()
            if record is None or record.status.terminal
        }

    def is_event_id(self, text: str) -> bool:
        return _EVENT_ID.fullmatch(text) is not None

    async def events(self, job_id: str, after: str | None = None) -> AsyncIterator[JobEvent]:
        if after is not None and not self.is_event_id(after):
            raise ValueError("there is no such event")
        record, told = self.jobs.records[job_id], int(after or 0)
        while True:
            changed = record.changed
            while told < len(record.events):  # it grows while its reader is busy
                told += 1
                yield record.events[told - 1]
            if record.status.terminal:
                return
            await changed.wait()

    async def forget(self, job_id: str) -> None:
        self.jobs.forget(job_id)

    async def backlog(self, tenant: str | None = None, *, models: Collection[str] | None = None) -> Backlog:
        return self.jobs.counts.backlog(tenant) if models is None else self.jobs.counts.backlog_for(models)

    async def totals(self) -> list[Total]:
        return self.jobs.counts.totals()

    async def expire_late(self) -> None:
        self.jobs.expire_late()

    async def reap(self) -> int:
        if queued := self.jobs.reap():
            self._arrived.set()
        return queued

    async def announce(self, worker: str, offers: Mapping[str, Offer]) -> None:
        self._offers[worker] = (self._clock(), dict(offers))

    async def offers(self) -> dict[str, dict[str, Offer]]:
        oldest = self._clock() - self._lease_s
        return {worker: offers for worker, (heard, offers) in self._offers.items() if heard >= oldest}

    async def claim_deliveries(self, n: int) -> list[Delivery]:
        return self.jobs.outbox.claim(n)

    async def delivered(self, delivery: Delivery) -> bool:
        return self.jobs.outbox.delivered(delivery)

    async def retry_delivery(self, delivery: Delivery, delay_s: float, *, put_off: bool = False) -> bool:
        return self.jobs.outbox.retry(delivery, delay_s, put_off=put_off)

    async def ping(self) -> None:
        pass

    async def risks(self) -> list[str]:
        return []

    async def close(self) -> None:
        pass
