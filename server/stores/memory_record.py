"""A job as the memory store keeps it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from server.jobs import (
    End,
    EventType,
    IdempotencyKey,
    Job,
    JobEvent,
    JobFailure,
    JobResult,
    JobState,
    JobStatus,
    Lease,
    Preview,
)


@dataclass(eq=False)
class Record:
    """A job and what became of it. accepted, since: clock then, and at its last change of status or heartbeat."""

    job: Job
    key: IdempotencyKey | None
    since: float
    deadline: float | None
    accepted: float
    status: JobStatus = JobStatus.QUEUED
    worker: str = ""
    attempt: int = 0
    lost: int = 0
    crashes: int = 0
    step: int = 0
    result: JobResult | None = None
    failure: JobFailure | None = None
    events: list[JobEvent] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def alone(self) -> bool:
        return self.lost > 0 or self.crashes > 0

    def held_by(self, lease: Lease) -> bool:
        return self.status is JobStatus.RUNNING and (self.worker, self.attempt) == (lease.worker, lease.attempt)

    @property
    def end(self) -> End:
        """Of one that has ended."""
        return End(status=self.status, seconds=self.since - self.accepted)

    def past(self, now: float) -> bool:
        return self.deadline is not None and now >= self.deadline and not self.status.terminal

    def tell(self, kind: EventType, preview: Preview | None = None) -> None:
        """Add to the history and wake those who follow it; each then waits on a fresh event."""
        self.events.append(JobEvent(id=str(len(self.events) + 1), type=kind, step=self.step, preview=preview))
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()
        if self.status.terminal:
            self.ended.set()

    def state(self, queue_position: int | None) -> JobState:
        return JobState(
            job=self.job,
            status=self.status,
            attempt=self.attempt,
            step=self.step,
            queue_position=queue_position,
            result=self.result,
            failure=self.failure,
        )

    def lease(self, now: float) -> Lease:
        """The hold its worker has from now on."""
        left_ms = None if self.deadline is None else (self.deadline - now) * 1000
        queued_ms = (now - self.accepted) * 1000
        self.since = now
        return Lease(
            job=self.job,
            worker=self.worker,
            attempt=self.attempt,
            queued_ms=queued_ms,
            alone=self.alone,
            left_ms=left_ms,
        )
