"""What every route of one process shares: models, store, admission, metrics, and whether it is leaving."""

from __future__ import annotations

import asyncio
import math
import time
from asyncio import Lock
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakValueDictionary

from server.admission import Admission
from server.auth import Caller, Keyring, current_caller
from server.catalogue import Catalogue
from server.costs import CostBook
from server.counting import RequestCounts
from server.decoding import Decode, Decoding
from server.entrance import Entrance
from server.errors import ApiError, InvalidRequestError, OverloadedError, RateError, not_worth_a_retry, store_away
from server.jobs import (
    EncodedImage,
    End,
    IdempotencyConflictError,
    IdempotencyKey,
    Job,
    JobFailure,
    JobState,
    JobStatus,
    Submission,
)
from server.links import FileLinks, Link
from server.metrics import Metrics
from server.rates import AskRate, Rates
from server.request import DenoiseRequest
from server.schemas import Readiness
from server.settings import Settings
from server.signing import Signer
from server.storage import FileGoneError, ResultStore, ResultStoreError
from server.stores.base import JobStore, StoreUnavailableError, UnreadableJobError
from server.tracing import carrier
from server.webhooks import Webhooks

DRAINING = JobFailure(
    code="draining", message="This server is about to end; send the request again.", retry_after_s=1.0
)
ENGINE_DOWN = JobFailure(
    code="engine_down", message="The engine of this server has ended; send the request again.", retry_after_s=1.0
)


@dataclass(frozen=True)
class JobOptions:
    """What a job that lives on its own may have besides its request; see ``Job``."""

    priority: int = 0
    deadline_ms: int | None = None
    webhook_url: str | None = None
    base_url: str = ""


NO_OPTIONS = JobOptions()


@dataclass(eq=False)
class Service:
    """draining: set once the process was told to end; it then finishes what it accepted.

    engine_down: set once no worker is left to make anything; engine_up: whether the engine of this process, if it
    has one, takes jobs; keyring: None where everyone is let in.
    costs: what the workers have told of themselves; files: where results go whose addresses are asked for.
    """

    settings: Settings
    catalogue: Catalogue
    store: JobStore
    admission: Admission
    metrics: Metrics
    costs: CostBook = field(default_factory=CostBook)
    keyring: Keyring | None = None
    rates: Rates = field(default_factory=Rates)
    files: ResultStore | None = None
    signer: Signer = field(init=False)
    links: FileLinks | None = field(init=False)
    webhooks: Webhooks = field(init=False)
    counts: RequestCounts = field(init=False)
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    engine_down: bool = False
    engine_up: Callable[[], bool] = lambda: True
    _open: set[str] = field(default_factory=set)
    _entering: int = 0
    """Submissions under way that were not turned away."""
    _entrance: Entrance = field(init=False)
    _decoding: Decoding = field(default_factory=Decoding)
    _turns: WeakValueDictionary[tuple[str, str], Lock] = field(default_factory=WeakValueDictionary)
    """By idempotency key: its submissions, one after another."""

    def __post_init__(self) -> None:
        secret = self.settings.secret.get_secret_value()
        self.signer = Signer(secret or None)
        self.links = None if self.files is None else FileLinks(self.files, self.signer)
        self.webhooks = Webhooks(self.settings.webhook_allow, self.signer, self.store, self.links)
        self.counts = RequestCounts(self.metrics, self.store)
        self._entrance = Entrance(self.admission, self.store, self.costs, self.keyring)

    async def decoded(
        self, outline: DenoiseRequest, decode: Decode, options: JobOptions = NO_OPTIONS
    ) -> DenoiseRequest:
        """What ``decode`` makes of a request's files; nothing is decoded where it would be refused all the same.

        outline: the request without them.
        Raises: OverloadedError, RateError and InvalidRequestError as ``submit``; what ``decode`` raises.
        """
        check = partial(self._check_room, outline, options)
        await check()  # no refusal waits for the decoding of others
        return await self._decoding.run(decode, check)  # who may have taken the room meanwhile

    @asynccontextmanager
    async def accepted(self, request: DenoiseRequest) -> AsyncIterator[str]:
        """The id of a job that lives as long as its caller waits: leaving the block early cancels it.

        Raises: OverloadedError when there is no room, or the process is about to end.
        """
        job, _ = await self._submit(request)
        self.counts.accepted(job)
        started = time.monotonic()
        self._open.add(job.id)
        try:
            yield job.id
        except ApiError as error:
            error.after_acceptance = True
            raise
        finally:
            self._open.discard(job.id)
            try:
                await self.store.cancel(job.id)
                state = await self.store.get(job.id)
            except (StoreUnavailableError, UnreadableJobError):
                self.counts.unwanted(job.id)
                self.counts.await_end(job)
            else:
                status = JobStatus.CANCELLED if state is None else state.status
                self.counts.ended(job, End(status=status, seconds=time.monotonic() - started))
                with suppress(StoreUnavailableError):
                    await self.store.forget(job.id)

    async def result(self, job_id: str) -> JobState:
        """An accepted job once it has ended. Raises: OverloadedError when the store came back without it."""
        try:
            return await self.store.wait(job_id)
        except KeyError:
            raise store_away() from None

    async def submit(
        self,
        request: DenoiseRequest,
        key: IdempotencyKey | None = None,
        options: JobOptions = NO_OPTIONS,
        decode: Decode | None = None,
    ) -> str:
        """The id of a job that lives on its own; an earlier one where the key was used for the same body before.

        decode: of a request with files, which ``request`` then lacks. An earlier job needs no room, spends nothing
        and has nothing decoded.

        Raises: OverloadedError, RateError; ApiError 422 when the key was used for another body; InvalidRequestError
        when files are to be stored and there is nowhere to; what ``decode`` raises.
        """
        if key is None:
            return await self._start(request, None, options, decode)
        turn = self._turns.setdefault((key.tenant, key.key), Lock())
        async with turn:  # so that of those that come at once, too, one alone is decoded and charged
            earlier = await self.store.find_key(key.tenant, key.key)
            if earlier is None:
                return await self._start(request, key, options, decode)
        first, job_id = earlier
        if first != key:
            raise _key_reused()
        return job_id

    @property
    def leaving(self) -> asyncio.Event | None:
        """Set once callers need not wait here, as others finish what was accepted; None where nobody else does."""
        return self.draining if self.store.outlives_process else None

    async def until_ended(self, job_id: str) -> JobState | None:
        """A job once it has ended; None when this process is about to and another finishes the job.

        Raises: KeyError when the job is unknown or forgotten.
        """
        if self.leaving is None:
            return await self.store.wait(job_id)
        end = asyncio.ensure_future(self.store.wait(job_id))
        leaving = asyncio.ensure_future(self.leaving.wait())
        try:
            await asyncio.wait((end, leaving), return_when=asyncio.FIRST_COMPLETED)
            return end.result() if end.done() else None
        finally:
            end.cancel()
            leaving.cancel()
            await asyncio.gather(end, leaving, return_exceptions=True)

    async def links_of(self, state: JobState, base_url: str) -> list[Link | None]:
        """The addresses of a job's stored files; None for what came inside its result. Raises: ResultStoreError."""
        images = () if state.result is None else state.result.images
        return [await self._link(image, base_url) for image in images]

    async def file_of(self, image: EncodedImage) -> bytes:
        """Raises: ApiError 410 where the file is gone; ResultStoreError."""
        if image.key is None:
            return image.inline()
        if self.files is None:
            raise ResultStoreError("this process knows no result store, but its workers do")
        try:
            return await self.files.read(image.key)
        except FileGoneError:
            raise ApiError(410, "gone", "This file is gone: its time is over.") from None

    async def _link(self, image: EncodedImage, base_url: str) -> Link | None:
        if image.key is None:
            return None
        if self.links is None:
            raise ResultStoreError("this process knows no result store, but its workers do")
        return await self.links.link(image.key, base_url)

    async def _start(
        self, request: DenoiseRequest, key: IdempotencyKey | None, options: JobOptions, decode: Decode | None
    ) -> str:
        if decode is not None:
            request = await self.decoded(request, decode, options)
        job, submission = await self._submit(request, key, options)
        if not submission.replayed:
            self.counts.follow(job)
        return submission.job_id

    async def abandon(self, failure: JobFailure) -> int:
        """Fail what was accepted here and is not finished; their callers get the failure. Returns how many.

        While the store is away none can be failed; whoever waits for one is told that instead.
        """

        async def abandon(job_id: str) -> bool:
            with suppress(StoreUnavailableError):
                return await self.store.abandon(job_id, failure)
            return False

        ending = self._open if self.store.outlives_process else self._open | self.counts.followed
        return sum(await asyncio.gather(*map(abandon, ending)))

    async def idle(self) -> bool:
        """Nothing let in here is still to be accepted, to be done by this process or to be answered by it."""
        if self._entering or self._open:
            return False
        return self.store.outlives_process or (await self.store.backlog()).jobs == 0

    async def readiness(self) -> Readiness:
        if self.engine_down:
            return "engine_down"
        if self.draining.is_set():
            return "draining"
        if not self.engine_up():
            return "engine_down"
        try:
            await self.store.ping()
        except StoreUnavailableError:
            return "store_unavailable"
        return "ok"

    async def _submit(
        self, request: DenoiseRequest, key: IdempotencyKey | None = None, options: JobOptions = NO_OPTIONS
    ) -> tuple[Job, Submission]:
        self._check_open(request)
        caller = current_caller.get()
        job = Job(
            id=self.signer.new_job_id(caller.tenant),
            request=request,
            cost_s=self.admission.cost_s(request),
            tenant=caller.tenant,
            priority=options.priority,
            deadline_ms=options.deadline_ms,
            webhook_url=options.webhook_url,
            base_url=options.base_url,
            trace=carrier(),
        )
        self._entering += 1  # nothing has waited since the look at ``draining``
        try:
            async with self._entrance.open_to(job):
                await self._heed_quota(self.rates.spend, caller, request.n)
                return job, await self._into_store(job, key)
        except IdempotencyConflictError:
            raise _key_reused() from None
        finally:
            self._entering -= 1  # the caller knows of it before anything else can run

    async def _check_room(self, outline: DenoiseRequest, options: JobOptions) -> None:
        """Raises: what ``_submit`` would. Nothing is spent."""
        caller = current_caller.get()
        job = Job.model_construct(  # not validated, as the outline has no files
            id="",
            request=outline,
            cost_s=self.admission.cost_s(outline),
            tenant=caller.tenant,
            deadline_ms=options.deadline_ms,
        )
        self._check_open(outline)
        await self._entrance.check(job)
        await self._heed_quota(self.rates.wait_s, caller, outline.n)

    def _check_open(self, request: DenoiseRequest) -> None:
        if request.stored and self.files is None:
            message = (
                "response_format url needs a result store, which this server has not (HALFSTEP_RESULT_STORE); "
                "leave the field out."
            )
            raise InvalidRequestError("unsupported_value", message, param="response_format")
        if self.engine_down:
            raise _refusal(ENGINE_DOWN)
        if self.draining.is_set():
            raise _refusal(DRAINING)

    async def _into_store(self, job: Job, key: IdempotencyKey | None) -> Submission:
        try:
            return await self.store.submit(job, key)
        except StoreUnavailableError:
            if key is None:  # it may have arrived for all that, and nobody has its id
                self.counts.unwanted(job.id)
            raise

    async def _heed_quota(self, ask: AskRate, caller: Caller, images: int) -> None:
        wait_s = await ask(caller.quota or self.settings.quota, images, "quota", caller.tenant)
        if wait_s == math.inf:
            message = "The quota of this tenant never allows so many images at once; ask for fewer."
            raise ApiError(403, "quota_too_small", message)
        if wait_s is not None:
            message = "The quota of this tenant is used up; the Retry-After header says when to try again."
            raise RateError("quota_exceeded", message, retry_after_s=wait_s)


def _refusal(failure: JobFailure) -> OverloadedError:
    return OverloadedError(failure.code, failure.message, retry_after_s=failure.retry_after_s or 1.0)


def _key_reused() -> ApiError:
    message = "This Idempotency-Key was used for another body; take a new key for a new request."
    return not_worth_a_retry(422, "idempotency_key_reuse", message)


def succeeded(state: JobState) -> bool:
    return state.status is JobStatus.SUCCEEDED and state.result is not None
