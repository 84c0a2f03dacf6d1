"""What every route of one process shares: models, store, admission, metrics, and whether it is leaving."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from server.admission import Admission
from server.auth import Keyring
from server.catalogue import Catalogue
from server.costs import CostBook
from server.errors import ApiError, OverloadedError
from server.jobs import Job, JobFailure, JobState, JobStatus
from server.metrics import Metrics
from server.rates import Rates
from server.request import DenoiseRequest
from server.schemas import Readiness
from server.settings import Settings
from server.stores.base import JobStore, StoreUnavailableError

DRAINING = JobFailure(
    code="draining", message="This server is about to end; send the request again.", retry_after_s=1.0
)
ENGINE_DOWN = JobFailure(
    code="engine_down", message="The engine of this server has ended; send the request again.", retry_after_s=1.0
)


@dataclass(eq=False)
class Service:
    """draining: set once the process was told to end; it then finishes what it accepted.

    engine_down: set once no worker is left to make anything; keyring: None where everyone is let in.
    costs: what the workers have told of themselves.
    """

    settings: Settings
    catalogue: Catalogue
    store: JobStore
    admission: Admission
    metrics: Metrics
    costs: CostBook = field(default_factory=CostBook)
    keyring: Keyring | None = None
    rates: Rates = field(default_factory=Rates)
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    engine_down: bool = False
    _open: set[str] = field(default_factory=set)

    @asynccontextmanager
    async def accepted(self, request: DenoiseRequest) -> AsyncIterator[str]:
        """The id of a job that lives as long as its caller waits: leaving the block early cancels it.

        Raises: OverloadedError when there is no room, or the process is about to end.
        """
        job = await self._submit(request)
        started = time.monotonic()
        self._open.add(job.id)
        try:
            yield job.id
        except ApiError as error:
            error.after_acceptance = True
            raise
        finally:
            self._open.discard(job.id)
            with suppress(StoreUnavailableError):  # the job ends by itself, and is dropped after its time
                await self.store.cancel(job.id)
                await self._count(job, time.monotonic() - started)
                await self.store.forget(job.id)

    async def abandon(self, failure: JobFailure) -> int:
        """Fail what was accepted here and is not finished; their callers get the failure. Returns how many."""
        return sum([await self.store.abandon(job_id, failure) for job_id in list(self._open)])

    async def idle(self) -> bool:
        """Nothing accepted here is still to be done by this process or to be answered by it."""
        if self._open:
            return False
        return self.store.outlives_process or (await self.store.backlog()).jobs == 0

    async def readiness(self) -> Readiness:
        if self.engine_down:
            return "engine_down"
        if self.draining.is_set():
            return "draining"
        try:
            await self.store.ping()
        except StoreUnavailableError:
            return "store_unavailable"
        return "ok"

    async def _submit(self, request: DenoiseRequest) -> Job:
        if self.engine_down:
            raise _refusal(ENGINE_DOWN)
        if self.draining.is_set():
            raise _refusal(DRAINING)
        self.admission.check(await self.store.backlog(), request)
        job = Job(id=secrets.token_hex(12), request=request, cost_s=self.admission.cost_s(request))
        await self.store.submit(job)
        self.metrics.accepted.labels(request.model, request.task).inc()
        return job

    async def _count(self, job: Job, seconds: float) -> None:
        """Accepted requests and terminal ones are counted one for one."""
        state = await self.store.get(job.id)
        status = JobStatus.CANCELLED if state is None else state.status
        size = f"{job.request.width}x{job.request.height}"
        self.metrics.requests.labels(job.request.model, job.request.task, size, status.value).inc()
        if status is JobStatus.SUCCEEDED:
            self.metrics.request_s.labels(job.request.model, job.request.task).observe(seconds)


def _refusal(failure: JobFailure) -> OverloadedError:
    return OverloadedError(failure.code, failure.message, retry_after_s=failure.retry_after_s or 1.0)


def succeeded(state: JobState) -> bool:
    return state.status is JobStatus.SUCCEEDED and state.result is not None
