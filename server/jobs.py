"""Jobs, their states, and the protocol of the store between APIs and workers.

queued ──claim──▶ running ──finish──▶ succeeded
   │                 ├─────fail─────▶ failed
   └────cancel───────┴───cancel─────▶ cancelled
Its API may also abandon a job that is queued or running: that fails it.
A lease that falls silent goes back to queued with the next attempt number; the older attempt can then no
longer finish the job (the fence).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from enum import StrEnum
from typing import Protocol

from pydantic import Field

from server.request import DenoiseRequest, Frozen, OutputFormat

HEARTBEAT_S = 1.0
"""How often a worker extends its leases."""


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in _TERMINAL


_TERMINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})


class Timing(Frozen):
    """Milliseconds a job spent in each stage; its stages were shared with whatever ran beside it."""

    queue: float = Field(0.0, ge=0, description="ms from acceptance to the start of the condition stage")
    condition: float = Field(0.0, ge=0, description="ms in the text condition (0 when it was cached)")
    steps: float = Field(0.0, ge=0, description="ms in denoising steps")
    decode: float = Field(0.0, ge=0, description="ms in the decoder")
    encode: float = Field(0.0, ge=0, description="ms in PNG, JPEG or WebP encoding")


class EncodedImage(Frozen):
    """A finished file. data: the bytes of a PNG, JPEG or WebP."""

    seed: int
    data: bytes
    format: OutputFormat


class Preview(Frozen):
    """A clean estimate on the way. image: k of n; index: 0 … partial_images - 1."""

    image: int
    index: int
    data: bytes


class JobResult(Frozen):
    """What a worker made. engine: backend, version and precision, as responses report it."""

    engine: str
    timing: Timing
    images: tuple[EncodedImage, ...]


class JobFailure(Frozen):
    """Why a job failed, in words fit for its client.

    retry_after_s: set where the job was given up unmade, so that the client may send it again after so long.
    """

    code: str
    message: str
    retry_after_s: float | None = None


MAX_ATTEMPTS = 20
"""A job whose lease is lost so often is not queued again."""

POISON = JobFailure(code="poison", message="Every attempt at this request ended with its worker; it was given up.")


class Job(Frozen):
    """A request as the store keeps it. cost_s: predicted engine seconds."""

    id: str
    request: DenoiseRequest
    cost_s: float = Field(ge=0)


class JobState(Frozen):
    """A job as of now. step: denoising steps done by its slowest image."""

    job: Job
    status: JobStatus
    attempt: int = 0
    step: int = 0
    previews: tuple[Preview, ...] = ()
    result: JobResult | None = None
    failure: JobFailure | None = None


class Lease(Frozen):
    """A worker's hold on a job. queued_ms: how long it waited; attempt: the fence of every later call."""

    job: Job
    worker: str
    attempt: int
    queued_ms: float = Field(ge=0)

    @property
    def token(self) -> str:
        """Names this hold: one job's attempts have different tokens."""
        return f"{self.job.id}/{self.attempt}"


class Backlog(Frozen):
    """Accepted work that is not finished: jobs, their images, and predicted engine seconds."""

    jobs: int
    rows: int
    seconds: float


class JobStore(Protocol):
    """Every call may raise OSError when the store cannot be reached; none is lost half-way."""

    async def submit(self, job: Job) -> None:
        """Accept a job. Raises: ValueError when the id exists."""
        ...

    async def claim(self, worker: str, rows: int, wait_s: float = 0.0) -> list[Lease]:
        """Oldest queued jobs whose images fit in ``rows``, in order; waits up to wait_s for the first one.

        A job that does not fit is not overtaken by younger ones.
        """
        ...

    async def heartbeat(self, leases: Collection[Lease]) -> frozenset[str]:
        """Extend leases; returns the tokens of those to stop: cancelled, or no longer the worker's."""
        ...

    async def progress(self, lease: Lease, step: int, previews: Sequence[Preview] = ()) -> None:
        """Report the steps done, and new previews. Ignored when the lease is no longer held."""
        ...

    async def finish(self, lease: Lease, result: JobResult) -> bool:
        """Commit a result; False, and no change, when the lease is no longer held."""
        ...

    async def fail(self, lease: Lease, failure: JobFailure) -> bool:
        """Commit a failure; False, and no change, when the lease is no longer held."""
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

    def watch(self, job_id: str) -> AsyncIterator[JobState]:
        """States as they change, the last one terminal; fast changes may be seen as one.

        Raises: KeyError when the job is unknown or forgotten.
        """
        ...

    async def forget(self, job_id: str) -> None:
        """Drop a terminal job whose result was delivered; others are left alone."""
        ...

    async def backlog(self) -> Backlog: ...

    async def reap(self) -> int:
        """Requeue silent leases and drop old results; returns how many were requeued.

        A job at its ``MAX_ATTEMPTS``-th lost lease fails with ``POISON`` instead.
        """
        ...
