"""Jobs, their states and results: what passes between APIs, the store and workers.

queued ──claim──▶ running ──finish──▶ succeeded
   │                 ├─────fail─────▶ failed
   ├────cancel───────┼───cancel─────▶ cancelled
   └───deadline──────┴──deadline────▶ expired
Its API may also abandon a job that is queued or running: that fails it.
A lease that falls silent goes back to queued; the next claim has the next attempt number, and the older attempt
can then no longer finish the job (the fence). A job that took its worker down once runs alone from then on.
"""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Literal

from pydantic import Field

from server.request import DenoiseRequest, Frozen, OutputFormat

HEARTBEAT_S = 1.0
"""How often a worker extends its leases."""

DEFAULT_TENANT = "default"

MAX_PRIORITY = 9

PRIORITY_S = 60.0
"""What a level of priority is worth: a job goes ahead of those of its tenant that came up to so much earlier."""

MAX_ATTEMPTS = 20
"""A job whose lease is lost so often is not queued again."""

MAX_CRASHES = 2
"""A job that took the engine process down so often while it ran alone is not queued again."""


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def terminal(self) -> bool:
        return self not in (JobStatus.QUEUED, JobStatus.RUNNING)


class Timing(Frozen):
    """Milliseconds a job spent in each stage; its stages were shared with whatever ran beside it."""

    queue: float = Field(0.0, ge=0, description="ms from acceptance to the start of the condition stage")
    condition: float = Field(0.0, ge=0, description="ms in the text condition (0 when it was cached)")
    steps: float = Field(0.0, ge=0, description="ms in denoising steps")
    decode: float = Field(0.0, ge=0, description="ms in the decoder")
    encode: float = Field(0.0, ge=0, description="ms in PNG, JPEG or WebP encoding")


class EncodedImage(Frozen):
    """A finished file. data: its bytes; key: where it lies in the result store instead.

    flagged: the safety check withheld it, so there is neither.
    """

    seed: int
    flagged: bool = False
    data: bytes | None = None
    key: str | None = None
    format: OutputFormat

    def inline(self) -> bytes:
        """Raises: ValueError when the file lies in the result store, or was withheld."""
        if self.data is None:
            raise ValueError("this file does not come inside its result")
        return self.data

    def stored_key(self) -> str:
        """Raises: ValueError when the file came inside the result."""
        if self.key is None:
            raise ValueError("this file does not lie in the result store")
        return self.key


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


class JobFailedError(Exception):
    """A job that cannot be finished, and what its client is told."""

    def __init__(self, failure: JobFailure) -> None:
        super().__init__(failure.code)
        self.failure = failure


POISON = JobFailure(code="poison", message="Every attempt at this request ended with its worker; it was given up.")


class Job(Frozen):
    """A request as the store keeps it. cost_s: predicted engine seconds.

    priority: 0 … 9, higher first within a tenant; deadline_ms: from acceptance, after which no step is run;
    base_url: of the API as its client reached it, without a slash at the end;
    trace: the W3C trace context of the request; created_s: seconds since 1970, set by the store that accepts it.
    """

    id: str
    request: DenoiseRequest
    cost_s: float = Field(ge=0)
    tenant: str = DEFAULT_TENANT
    priority: int = Field(0, ge=0, le=MAX_PRIORITY)
    deadline_ms: int | None = Field(None, ge=1)
    webhook_url: str | None = None
    base_url: str = ""
    trace: dict[str, str] = Field(default_factory=dict)
    created_s: float = 0.0


class JobState(Frozen):
    """A job as of now. step: denoising steps done by its slowest image.

    queue_position: how many jobs are expected to be claimed before it while it is queued: those of its tenant, and
    as many of every other tenant.
    """

    job: Job
    status: JobStatus
    attempt: int = 0
    step: int = 0
    queue_position: int | None = None
    result: JobResult | None = None
    failure: JobFailure | None = None

    @property
    def left_s(self) -> float:
        """Predicted engine seconds of the steps not done yet."""
        return self.job.cost_s * (1 - self.step / self.job.request.network_steps)


class Lease(Frozen):
    """A worker's hold on a job. queued_ms: from acceptance to the claim; attempt: the fence of every later call.

    alone: run nothing else beside it; left_ms: until its deadline, as of the claim; claimed_s: when that was, by
    time.perf_counter, which all processes of a machine share.
    """

    job: Job
    worker: str
    attempt: int
    queued_ms: float = Field(ge=0)
    alone: bool = False
    left_ms: float | None = None
    claimed_s: float = Field(default_factory=time.perf_counter)

    @property
    def token(self) -> str:
        """Names this hold: one job's attempts have different tokens."""
        return f"{self.job.id}/{self.attempt}"


class Report(Frozen):
    """Progress of a leased job: the steps its slowest image has done, and new previews."""

    lease: Lease
    step: int
    previews: tuple[Preview, ...] = ()


EventType = Literal["queued", "running", "step", "succeeded", "failed", "cancelled", "expired"]
"""``step``, or the status a job has from then on."""


class JobEvent(Frozen):
    """One entry of a job's history. id: its place there, for replaying what came after it.

    step: done by the slowest image; preview: at most one an event, ahead of the event of the step itself.
    """

    id: str
    type: EventType
    step: int = 0
    preview: Preview | None = None

    @property
    def terminal(self) -> bool:
        return self.type not in ("queued", "running", "step")


class IdempotencyKey(Frozen):
    """The client's own name of a request, per tenant. fingerprint: of the body, so that reuse is noticed."""

    tenant: str
    key: str = Field(min_length=1, max_length=255)
    fingerprint: str


class IdempotencyConflictError(Exception):
    """The key was used for another body."""


class Submission(Frozen):
    """replayed: the key was known and the job is the earlier one."""

    job_id: str
    replayed: bool = False


class End(Frozen):
    """How a job ended, and how many seconds after its acceptance; status None where the store has forgotten it."""

    status: JobStatus | None
    seconds: float = 0.0


class Delivery(Frozen):
    """A webhook to send, as it was claimed.

    ended_s: when the job ended, seconds since 1970; age_s: how long ago that was. claim: the fence, counts from 1;
    attempt: as claim, without those that were put off.
    """

    job_id: str
    tenant: str
    url: str
    status: JobStatus
    ended_s: float
    age_s: float
    claim: int
    attempt: int


class Backlog(Frozen):
    """Accepted work that is not finished: jobs, their images, and predicted engine seconds."""

    jobs: int = 0
    rows: int = 0
    seconds: float = 0.0

    def __add__(self, other: Backlog) -> Backlog:
        return Backlog(
            jobs=self.jobs + other.jobs, rows=self.rows + other.rows, seconds=self.seconds + other.seconds
        )


class Total(Frozen):
    """Jobs of a model and task counted since the store began; status None: accepted, else ended so."""

    model: str
    task: str
    status: JobStatus | None
    count: int
