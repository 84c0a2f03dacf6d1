"""Webhooks to send, in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from server.jobs import Delivery, Job, JobStatus


@dataclass
class _Waiting:
    delivery: Delivery
    since: float
    due: float


class MemoryOutbox:
    """lease_s: how long a claimed webhook is held; clock: monotonic seconds."""

    def __init__(self, lease_s: float, clock: Callable[[], float]) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._waiting: dict[str, _Waiting] = {}

    def add(self, job: Job, status: JobStatus, ended_s: float) -> None:
        delivery = Delivery(
            job_id=job.id,
            tenant=job.tenant,
            url=job.webhook_url or "",
            status=status,
            ended_s=ended_s,
            age_s=0.0,
            claim=0,
            attempt=0,
        )
        now = self._clock()
        self._waiting[job.id] = _Waiting(delivery, now, now)

    def claim(self, n: int) -> list[Delivery]:
        now = self._clock()
        due = sorted((w for w in self._waiting.values() if w.due <= now), key=lambda w: w.due)[:n]
        for waiting in due:
            last = waiting.delivery
            counted = {"age_s": now - waiting.since, "claim": last.claim + 1, "attempt": last.attempt + 1}
            waiting.delivery = last.model_copy(update=counted)
            waiting.due = now + self._lease_s
        return [waiting.delivery for waiting in due]

    def delivered(self, delivery: Delivery) -> bool:
        if not self._holds(delivery):
            return False
        del self._waiting[delivery.job_id]
        return True

    def retry(self, delivery: Delivery, delay_s: float, *, put_off: bool = False) -> bool:
        if not self._holds(delivery):
            return False
        waiting = self._waiting[delivery.job_id]
        waiting.due = self._clock() + delay_s
        if put_off:
            waiting.delivery = delivery.model_copy(update={"attempt": delivery.attempt - 1})
        return True

    def _holds(self, delivery: Delivery) -> bool:
        waiting = self._waiting.get(delivery.job_id)
        return waiting is not None and waiting.delivery.claim == delivery.claim
