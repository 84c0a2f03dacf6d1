"""The protocol of the store between APIs and workers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from typing import Protocol

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


class StoreUnavailableError(OSError):
    """The store cannot be reached, does not answer in time, or refuses to take anything in."""


class UnreadableJobError(ValueError):
    """A job, or its end, as another version of this program wrote it."""


class JobStore(Protocol):
    """Every call may raise StoreUnavailableError, and UnreadableJobError where it reads jobs; none is done by half.

    Jobs, keys and events live until ``result_ttl_s`` after the job's end. outlives_process: another process can
    finish what this one accepted.
    """

    outlives_process: bool

    async def submit(self, job: Job, key: IdempotencyKey | None = None) -> Submission:
        """Accept a job, or find the one accepted under the same key before.

        Raises: ValueError when the id exists; IdempotencyConflictError when the key was used for another body.
        """
        ...

    async def find_key(self, tenant: str, key: str) -> tuple[IdempotencyKey, str] | None:
        """A key as it was first used, and the id of its job."""
        ...

    async def claim(self, worker: str, models: Collection[str], rows: int, wait_s: float = 0.0) -> list[Lease]:
        """Queued jobs of these models whose images fit in ``rows``; waits up to wait_s for the first one.

        Tenants take turns by the predicted seconds they were served; within a tenant, priority and age decide.
        A job that is next but does not fit is not overtaken. A job that must run alone comes first, by itself.
        """
        ...

    async def heartbeat(self, leases: Collection[Lease]) -> frozenset[str]:
        """Extend leases; returns the tokens of those to stop: ended, or no longer the worker's."""
        ...

    async def progress(self, reports: Sequence[Report]) -> frozenset[str]:
        """Write down progress, which never goes back, of leases still held; returns the tokens of those to stop."""
        ...

    async def finish(self, lease: Lease, result: JobResult) -> bool:
        """Commit a result; False, and no change, when the lease is no longer held."""
        ...

    async def fail(self, lease: Lease, failure: JobFailure) -> bool:
        """Commit a failure; False, and no change, when the lease is no longer held."""
        ...

    async def expire(self, lease: Lease) -> bool:
        """End a job whose deadline passed while it ran; False when it did not pass or the lease is not held."""
        ...

    async def give_back(self, lease: Lease, *, crashed: bool = False) -> JobStatus | None:
        """Queue a leased job again, ahead of others; its status from then on, None when the lease is not held.

        crashed: the engine process died with it; it then runs alone, and where it did already, counts towards
        ``MAX_CRASHES``, at which it fails with ``POISON``.
        """
        ...

    async def cancel(self, job_id: str) -> bool:
        """Cancel a job that is not terminal; False when it is, or is unknown."""
        ...

    async def abandon(self, job_id: str, failure: JobFailure) -> bool:
        """Fail a job that is not terminal, whoever holds it; False when it is, or is unknown."""
        ...

    async def get(self, job_id: str) -> JobState | None: ...

    async def wait(self, job_id: str) -> JobState:
        """The state once terminal. Raises: KeyError when the job is unknown or forgotten."""
        ...

    async def until_ended(self, job_id: str) -> None:
        """Wait until the job is terminal, or no longer known."""
        ...

    async def ends(self, job_ids: Iterable[str]) -> dict[str, End]:
        """Those of these jobs that have ended, or that the store does not know."""
        ...

    def is_event_id(self, text: str) -> bool:
        """Whether this could be the id of an event here; each store has its own."""
        ...

    def events(self, job_id: str, after: str | None = None) -> AsyncIterator[JobEvent]:
        """The job's history, from the event after that id, as it happens; the last one is terminal.

        Raises: KeyError when the job is unknown or forgotten; ValueError when ``after`` is no event id.
        """
        ...

    async def forget(self, job_id: str) -> None:
        """Drop a terminal job whose result was delivered; others, and those with a key, are left alone."""
        ...

    async def backlog(self, tenant: str | None = None, *, models: Collection[str] | None = None) -> Backlog:
        """Of one tenant, of all jobs for some models, or of all."""
        ...

    async def totals(self) -> list[Total]:
        """Jobs accepted and ended since the store began; a job that ended was counted as accepted."""
        ...

    async def expire_late(self) -> None:
        """End what is past its deadline, as ``reap`` does too: while there is no worker, nobody else would."""
        ...

    async def reap(self) -> int:
        """Queue silent leases again, end what is past its deadline, drop old results; returns how many were queued.

        A job at its ``MAX_ATTEMPTS``-th lost lease fails with ``POISON`` instead.
        """
        ...

    async def announce(self, worker: str, offers: Mapping[str, Offer]) -> None:
        """Tell what a worker has ready, by model. It counts as gone when it was silent for a lease's time."""
        ...

    async def offers(self) -> dict[str, dict[str, Offer]]:
        """What the workers that are there have ready, by worker and model."""
        ...

    async def claim_deliveries(self, n: int) -> list[Delivery]:
        """Up to n webhooks that are due, held for a lease's time; then they are due again."""
        ...

    async def delivered(self, delivery: Delivery) -> bool:
        """Drop a webhook; False when it was claimed again meanwhile."""
        ...

    async def retry_delivery(self, delivery: Delivery, delay_s: float, *, put_off: bool = False) -> bool:
        """Make a webhook due again in delay_s; False when it was claimed again meanwhile.

        put_off: nothing was sent, so that this claim was no attempt.
        """
        ...

    async def ping(self) -> None:
        """Raises: OSError when the store cannot be reached or takes no work."""
        ...

    async def risks(self) -> list[str]:
        """What of its configuration may lose accepted jobs, in words; nothing where it does not tell."""
        ...

    async def close(self) -> None: ...
